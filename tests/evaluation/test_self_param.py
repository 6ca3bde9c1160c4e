"""The distance from each expert on its own prompts: its value by hand, its errors, and studies that minimise it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from command_line import here

from evaluators.self_param import SelfParam
from merge_search.errors import EvaluationError, StudyFileError
from merge_search.evaluation import Split, SplitShares
from merge_search.objective import Objective
from merge_search.search.records import finished_records, stored_references

SHARES = SplitShares(0.5, 0.25, 0.25)


class Guess(torch.nn.Module):
    """Answers the same logits at every position of every text."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Answer", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def tokens(text: str, *, truncation: bool, max_length: int) -> dict[str, list[int]]:
    return {"input_ids": [3 + ord(c) % 21 for c in text][:max_length]}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    for name, n in (("one", 24), ("two", 16)):
        rows = [json.dumps({"text": f"{name} has the text {i}"}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return {"include_path": str(tmp_path), "texts": {"one": "one.jsonl", "two": "two.jsonl"}, "max_length": 12}


def test_it_is_the_divergence_from_each_expert_to_the_merge_and_not_back(texts: dict[str, Any]) -> None:
    model = Guess(0.0, 0.0)
    judge = SelfParam(texts, shares=SHARES, seed=0)
    judge.bind(model, tokens, folder="")
    judge.cache_expert("one")  # (1/2, 1/2)
    model.logits[1] = math.log(3)
    judge.cache_expert("two")  # (1/4, 3/4)
    there = math.log(2) / 2 + math.log(2 / 3) / 2  # from "one" to "two"; back it is 0.131
    found = judge.evaluate(Split.SEARCH).scores
    assert found["self_param.one/kl"].score == pytest.approx(there, rel=1e-3)
    assert found["self_param.two/kl"].score == pytest.approx(0, abs=1e-5)
    model.logits[1] = 0.0
    back = math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4
    found = judge.evaluate(Split.SEARCH).scores
    assert found["self_param.two/kl"].score == pytest.approx(back, rel=1e-3)
    assert found["self_param.one/kl"].score == pytest.approx(0, abs=1e-5)


def test_questions_of_experts_and_merges_are_counted(texts: dict[str, Any]) -> None:
    judge = SelfParam(texts, shares=SHARES, seed=0)
    judge.bind(Guess(0.0, 1.0), tokens, folder="")
    assert judge.n_asked == 0
    judge.cache_expert("one")
    assert judge.n_asked == 24
    judge.cache_expert("two")
    assert judge.n_asked == 24 + 16
    n = sum(m.n_questions[Split.TEST] for m in judge.metrics())
    assert judge.evaluate(Split.TEST).cost.questions == n
    assert judge.n_asked == 24 + 16 + n


def test_each_expert_is_a_task_whose_mean_is_minus_the_mean_divergence(texts: dict[str, Any]) -> None:
    judge = SelfParam(texts, shares=SHARES, seed=0)
    infos = judge.metrics()
    assert [(m.name, m.higher_is_better, m.is_cost) for m in infos] == [
        ("self_param.one/kl", False, False),
        ("self_param.two/kl", False, False),
    ]
    objective = Objective(["mean", "mean_retention"], ["self_param.one"], ["self_param.two/kl <= base - 0.1"], infos)
    from merge_search.evaluation import Evaluation, Scores
    from merge_search.objective import References

    def scored(one: float, two: float) -> Evaluation:
        import numpy as np

        values = {"self_param.one/kl": one, "self_param.two/kl": two}
        return Evaluation(
            Split.SEARCH, 1.0, {n: Scores(("x", "y"), np.array([v, v]), v, 0.1) for n, v in values.items()}
        )

    experts = {"one": scored(0.0, 3.0), "two": scored(2.0, 0.0)}
    references = References.from_evaluations(infos, scored(1.0, 2.0), experts)
    assert references.best_expert == {"self_param.one/kl": "one", "self_param.two/kl": "two"}
    mean, retention, one = [e.value for e in objective.values(scored(0.25, 1.0), references)]
    assert (mean, retention, one) == pytest.approx((-(0.25 + 1.0) / 2, (0.75 + 0.5) / 2, 0.25))


def test_an_experts_own_answer_is_what_is_compared(texts: dict[str, Any], make_models: Any) -> None:
    _, live = make_models()
    live.model.generation_config.eos_token_id = None
    judge = SelfParam({**texts, "max_length": 5, "new_tokens": 4, "positions": 3}, shares=SHARES, seed=0)
    judge.bind(live.model, tokens, folder="")
    for expert in ("one", "two"):
        judge.cache_expert(expert)
    row = judge._kept["one"][Split.SEARCH][0].asked
    assert row.places.tolist() == [4, 6, 7], "the positions before the answer's tokens, evenly spaced"
    ids = torch.tensor([tokens(row.text, truncation=True, max_length=5)["input_ids"]])
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, live.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert row.ids.tolist() == ids.tolist()
    assert judge.evaluate(Split.SEARCH).scores["self_param.one/kl"].score == pytest.approx(0, abs=1e-5)


def test_what_is_wrong_is_told_at_once(texts: dict[str, Any]) -> None:
    with pytest.raises(StudyFileError) as caught:
        SelfParam({**texts, "texts": {"one": "gone.txt", "two": "lost.txt"}}, shares=SHARES, seed=0)
    assert [p.split(",")[0].split(" in ")[0] for p in caught.value.problems] == [
        "texts.one: no file gone.txt",
        "texts.two: no file lost.txt",
    ]
    with pytest.raises(StudyFileError, match=r"texts\.two: every split needs at least 2 texts"):
        SelfParam({**texts, "limit": 4}, shares=SHARES, seed=0)
    with pytest.raises(StudyFileError, match="postions: unknown key; did you mean 'positions'"):
        SelfParam({**texts, "postions": 3}, shares=SHARES, seed=0)
    judge = SelfParam(texts, shares=SHARES, seed=0)
    with pytest.raises(EvaluationError, match="bind a model first"):
        judge.cache_expert("one")
    judge.bind(Guess(0.0, 0.0), tokens, folder="")
    with pytest.raises(EvaluationError, match="'tow' has no texts; did you mean 'two'"):
        judge.cache_expert("tow")
    judge.cache_expert("one")
    with pytest.raises(EvaluationError, match="the answers of two are not stored"):
        judge.evaluate(Split.SEARCH)


def test_answers_that_do_not_fit_are_refused_before_an_expert_is_asked(
    texts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 texts at 3 positions over 2 outcomes of 2 bytes; 80 % of what is free may be taken, by two experts alike."""
    one_text = 2 * 3 * 2
    monkeypatch.setattr("evaluators.costs.next_tokens.free_host_bytes", lambda: 45 * one_text)
    judge = SelfParam({**texts, "positions": 3}, shares=SHARES, seed=0)
    with pytest.raises(
        StudyFileError, match=r"the experts' answers to 40 texts .* limit: 18 or positions: 2"
    ) as caught:
        judge.bind(Guess(0.0, 0.0), tokens, folder="")
    assert "evaluator self_param" in str(caught.value)
    fits = SelfParam({**texts, "positions": 3, "limit": 18}, shares=SHARES, seed=0)
    fits.bind(Guess(0.0, 0.0), tokens, folder="")
    for expert in ("one", "two"):
        fits.cache_expert(expert)
    kept = sum(k.log_p.nbytes for splits in fits._kept.values() for rows in splits.values() for k in rows)
    assert kept == (18 + 16) * one_text


# --- in a study -------------------------------------------------------------------------------------------------------


def study(demo: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    sources = {"maths": "maths", "stories": "stories"}
    for name in sources:
        rows = (demo / "tasks" / f"demo_{name}" / "train.jsonl").read_text().splitlines()[:40]
        texts = [" ".join(str(v) for v in json.loads(row).values()) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (folder / "neutral.txt").write_text("\n".join(f"line {i} of a neutral text" for i in range(20)))
    judge = {"evaluator": "self_param", "texts": {e: f"{e}.jsonl" for e in sources}, "max_length": 24, "positions": 4}
    return {
        "study": {"name": "near", "storage": "sqlite:///near.db"},
        "models": {"base": str(demo / "models/base"), "experts": {e: str(demo / "models" / e) for e in sources}},
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [judge, {"evaluator": "drift", "texts": "neutral.txt", "max_length": 12, "positions": 3}],
        "objective": {"maximise": "mean", "constraints": ["drift <= 5"]},
        "search": {"n_trials": 6, "finalists": 1, "baselines": [], "sampler": "random"},
        "device": "cpu",
        **changes,
    }


def test_a_study_minimises_the_mean_divergence_and_charges_what_the_experts_were_asked(
    demo: Path, tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(demo, tmp_path)))
    here("run", path)

    def load() -> optuna.Study:
        return optuna.load_study(study_name="near", storage=f"sqlite:///{tmp_path / 'near.db'}")

    stored = load()
    references = {name: data["evaluation"] for name, data in stored_references(stored).items()}
    for expert in ("maths", "stories"):
        assert references[expert]["scores"][f"self_param.{expert}/kl"]["score"] < 1e-3
        assert references["base"]["scores"][f"self_param.{expert}/kl"]["score"] > 0.05
    n_texts = 40 + 40
    asked = {name: e["cost"][2] for name, e in references.items()}
    assert asked["base"] == asked["maths"] + n_texts, "the first job is charged what the experts were asked"
    for record in finished_records(stored):
        found = [record.evaluation.scores[f"self_param.{e}/kl"].score for e in ("maths", "stories")]
        assert record.values[0] == pytest.approx(-sum(found) / 2)
    data = yaml.safe_load(path.read_text())
    data["search"]["n_trials"] = 8
    path.write_text(yaml.safe_dump(data))
    here("run", path)  # the experts' answers are asked for again
    done = finished_records(load())
    assert len(done) == 8
    assert done[6].evaluation.cost.questions == done[7].evaluation.cost.questions + n_texts


def test_an_expert_that_the_study_does_not_have_is_refused_before_weights_are_read(demo: Path, tmp_path: Path) -> None:
    data = study(demo, tmp_path)
    data["evaluate"][0]["texts"] = {"math": "maths.jsonl", "base": "stories.jsonl"}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    done = here("validate", path, check=False)
    assert done.returncode
    assert "'math' must be an expert under models.experts; did you mean 'maths'?" in done.stderr
    assert "'base' must be an expert" in done.stderr

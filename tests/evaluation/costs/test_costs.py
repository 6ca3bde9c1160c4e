"""Prices of a merge: drift from the base, seconds; objectives and constraints, never skills."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from evaluators.costs.drift import Drift
from evaluators.costs.latency import Latency
from evaluators.costs.texts import fewest_texts
from merge_search.errors import EvaluationError, NonFiniteError, StudyFileError
from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split, SplitShares
from merge_search.objective import Objective, References

SHARES = SplitShares(0.5, 0.25, 0.25)
WORDS = [f"text {i} of the tests, and so on" for i in range(40)]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("\n".join(WORDS[:20]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"query": t}) for t in WORDS[20:] + WORDS[:2]))
    return {"include_path": str(tmp_path), "texts": ["a.txt", "b.jsonl"], "key": "query"}


class Tokens:
    """One token per character, of 24."""

    def __call__(self, text: str, *, truncation: bool, max_length: int, return_tensors: str = "") -> Any:
        ids = [3 + ord(c) % 21 for c in text][:max_length]
        if return_tensors:
            return type("Encoded", (), {"input_ids": torch.tensor([ids])})
        return {"input_ids": ids}


def test_drift_is_the_mean_divergence_of_next_tokens(texts: dict[str, Any], make_models: Any) -> None:
    _, live = make_models()
    drift = Drift({**texts, "positions": 3, "max_length": 12, "batch_size": 5}, shares=SHARES, seed=0)
    drift.bind(live.model, Tokens(), folder="")
    assert drift.evaluate(Split.SEARCH).scores["drift/kl"].score == pytest.approx(0, abs=1e-5)
    before = {n: p.clone() for n, p in live.model.named_parameters()}
    text = drift._texts[Split.SEARCH][0]
    ids = torch.tensor([Tokens()(text, truncation=True, max_length=12)["input_ids"]])
    with torch.no_grad():
        p = live.model(input_ids=ids).logits[0, [0, 6, 11]].double().log_softmax(-1)
        for parameter in live.model.parameters():
            parameter.mul_(1.1)
        q = live.model(input_ids=ids).logits[0, [0, 6, 11]].double().log_softmax(-1)
    by_hand = float((p.exp() * (p - q)).sum(-1).mean())
    found = drift.evaluate(Split.SEARCH)
    assert found.scores["drift/kl"].values[0] == pytest.approx(by_hand, rel=5e-3)
    assert found.scores["drift/kl"].is_mean
    head = drift.evaluate(Split.SEARCH, 0.5)
    joined = head.joined(drift.evaluate(Split.SEARCH, 1.0, after=0.5))
    np.testing.assert_allclose(joined.scores["drift/kl"].values, found.scores["drift/kl"].values, rtol=1e-4)
    with torch.no_grad():
        for name, parameter in live.model.named_parameters():
            parameter.copy_(before[name])
        live.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        drift.evaluate(Split.SEARCH)


class Guess(torch.nn.Module):
    """Answers the same logits at every position of every text."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Answer", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_drift_is_the_divergence_from_the_base_to_the_merge_and_not_back(texts: dict[str, Any]) -> None:
    model = Guess(0.0, 0.0)
    drift = Drift(texts, shares=SHARES, seed=0)
    drift.bind(model, Tokens(), folder="")
    model.logits[1] = math.log(3)  # from (1/2, 1/2) to (1/4, 3/4)
    there = math.log(2) / 2 + math.log(2 / 3) / 2
    back = math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4
    found = drift.evaluate(Split.SEARCH).scores["drift/kl"].score
    assert found == pytest.approx(there, rel=1e-4)
    assert found != pytest.approx(back, rel=0.05)


@pytest.mark.parametrize(("kind", "n_asked"), [(Drift, 2 * 4), (Latency, 2)])
def test_a_cost_that_fails_says_what_it_asked_until_then(
    texts: dict[str, Any], make_models: Any, kind: Any, n_asked: int
) -> None:
    _, live = make_models()
    more = {"batch_size": 4} if kind is Drift else {"new_tokens": 0, "repeats": 1, "warm_up": 0}
    cost = kind({**texts, "max_length": 4, **more}, shares=SHARES, seed=0)
    cost.bind(live.model, Tokens(), folder="")
    assert cost.evaluate(Split.SEARCH).cost.questions == cost.n_asked
    before, calls = cost.n_asked, iter(range(1))

    def hook(*_: Any) -> None:
        if next(calls, None) is None:
            raise RuntimeError("kernel says no")

    handle = live.model.model.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="kernel says no"):
        cost.evaluate(Split.SEARCH)
    handle.remove()
    assert cost.n_asked == before + n_asked


def test_answers_that_do_not_fit_into_memory_are_refused_with_the_limit_that_does(
    texts: dict[str, Any], make_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, live = make_models()
    given = {**texts, "positions": 3, "max_length": 12}
    one_text = 2 * 3 * 24  # bytes x positions x vocabulary
    monkeypatch.setattr("evaluators.costs.next_tokens.free_host_bytes", lambda: 30 * one_text)
    drift = Drift(given, shares=SHARES, seed=0)
    with pytest.raises(StudyFileError, match="40 texts at 3 positions each over 24 outcomes take") as caught:
        drift.bind(live.model, Tokens(), folder="")
    limit = int(str(caught.value).partition("limit: ")[2].split()[0])
    assert limit == 24  # 80 % of what is free
    fits = Drift({**given, "limit": limit}, shares=SHARES, seed=0)
    fits.bind(live.model, Tokens(), folder="")
    kept = sum(row.log_p.nbytes for rows in fits._kept.values() for row in rows)
    assert kept == limit * one_text


@pytest.mark.parametrize(
    ("positions", "n_free", "advice"),
    [
        (3, 100, ["limit: 26", "positions: 2"]),
        (4, 60, ["positions: 1"]),
        (3, 45, ["limit: {fewest} with positions: 2"]),
    ],
)
def test_the_number_that_is_said_to_fit_fits(
    texts: dict[str, Any],
    make_models: Any,
    monkeypatch: pytest.MonkeyPatch,
    positions: int,
    n_free: int,
    advice: list[str],
) -> None:
    """Free: so many answers over 24 outcomes of two bytes, of 40 texts; 80 % of it may be taken."""
    _, live = make_models()
    given = {**texts, "positions": positions, "max_length": 12}
    monkeypatch.setattr("evaluators.costs.next_tokens.free_host_bytes", lambda: n_free * 2 * 24)
    drift = Drift(given, shares=SHARES, seed=0)
    fewest = fewest_texts(drift._texts)
    with pytest.raises(StudyFileError) as caught:
        drift.bind(live.model, Tokens(), folder="")
    wanted = [text.format(fewest=fewest) for text in advice]
    assert str(caught.value).endswith(f"are free; {' or '.join(wanted)} would fit")
    for text in wanted:
        changes = yaml.safe_load("{" + text.replace(" with ", ", ") + "}")
        fits = Drift({**given, **changes}, shares=SHARES, seed=0)
        fits.bind(live.model, Tokens(), folder="")


def test_where_nothing_fits_the_memory_that_would_do_is_said(
    texts: dict[str, Any], make_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, live = make_models()
    monkeypatch.setattr("evaluators.costs.next_tokens.free_host_bytes", lambda: 3 * 2 * 24)
    drift = Drift({**texts, "max_length": 12}, shares=SHARES, seed=0)
    with pytest.raises(StudyFileError, match=r"need .* GiB free at one position each: leave drift out") as caught:
        drift.bind(live.model, Tokens(), folder="")
    fewest = fewest_texts(drift._texts)
    assert f"limit: {fewest}, need {fewest * 2 * 24 / 0.8 / 2**30:.3g} GiB" in str(caught.value)
    with pytest.raises(StudyFileError, match="every split needs at least 2 texts"):
        Drift({**texts, "limit": fewest - 1}, shares=SHARES, seed=0)
    Drift({**texts, "limit": fewest}, shares=SHARES, seed=0)


def test_equal_texts_count_once_and_splits_are_disjoint(texts: dict[str, Any]) -> None:
    drift = Drift(texts, shares=SHARES, seed=0)
    found = [t for group in drift._texts.values() for t in group]
    assert sorted(found) == sorted(WORDS)
    assert sum(drift.metrics()[0].n_questions.values()) == 40


def test_wrong_texts_are_refused_all_at_once(texts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n[1]\n{"query": null}\n')
    with pytest.raises(StudyFileError, match="postions: unknown key; did you mean 'positions'"):
        Drift({**texts, "postions": 3}, shares=SHARES, seed=0)
    with pytest.raises(StudyFileError) as caught:
        Drift({**texts, "texts": ["bad.jsonl", "gone.txt"]}, shares=SHARES, seed=0)
    assert "bad.jsonl, line 2" in str(caught.value)
    assert "bad.jsonl, line 3" in str(caught.value)
    assert "no file gone.txt" in str(caught.value)
    with pytest.raises(StudyFileError, match="at least 2 texts"):
        Drift({**texts, "limit": 4}, shares=SHARES, seed=0)
    with pytest.raises(EvaluationError, match="bind a model"):
        Drift(texts, shares=SHARES, seed=0).evaluate(Split.SEARCH)


def test_a_text_in_json_may_hold_any_separator_and_other_encodings_are_refused(
    texts: dict[str, Any], tmp_path: Path
) -> None:
    rows = [json.dumps({"query": f"{t}\u2028more"}, ensure_ascii=False) for t in WORDS]
    (tmp_path / "b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    drift = Drift({**texts, "texts": ["b.jsonl"]}, shares=SHARES, seed=0)
    assert sum(drift.metrics()[0].n_questions.values()) == 40
    (tmp_path / "latin.txt").write_bytes("gr\u00fc\u00dfe".encode("latin-1"))
    with pytest.raises(StudyFileError, match=r"latin\.txt must be UTF-8"):
        Drift({**texts, "texts": ["latin.txt"]}, shares=SHARES, seed=0)


def test_latency_grows_with_what_is_written(texts: dict[str, Any], make_models: Any) -> None:
    _, live = make_models()
    live.model.generation_config.eos_token_id = None
    options = {**texts, "max_length": 4, "limit": 16}
    seconds = {}
    for n in (0, 8):
        latency = Latency({**options, "new_tokens": n}, shares=SHARES, seed=0)
        latency.bind(live.model, Tokens(), folder="")
        found = latency.evaluate(Split.SEARCH).scores["latency/seconds"]
        assert (found.values > 0).all()
        seconds[n] = float(np.median(found.values))
    assert seconds[8] > 2 * seconds[0]


def test_the_first_texts_of_every_call_are_answered_once_before_anything_is_timed(
    texts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """Every answer takes a second, and the first two after `cold` was set take a hundred."""

        now, cold = 0.0, 0

        def perf_counter(self) -> float:
            return self.now

        def answer(self, *_: Any) -> None:
            self.now += 100 if self.cold > 0 else 1
            self.cold -= 1

    clock, model = Clock(), Guess(0.0, 0.0)
    model.register_forward_pre_hook(clock.answer)
    monkeypatch.setattr("evaluators.costs.latency.time", clock)
    latency = Latency({**texts, "new_tokens": 0, "repeats": 1, "warm_up": 2}, shares=SHARES, seed=0)
    latency.bind(model, Tokens(), folder="")
    for split in (Split.SEARCH, Split.VALIDATION):
        clock.cold = 2
        found = latency.evaluate(split)
        assert set(found.scores["latency/seconds"].values.tolist()) == {1.0}
        assert found.cost.evaluate_s == 200 + found.cost.questions


ACC = MetricInfo("t", "acc", True, {Split.SEARCH: 4})
KL = MetricInfo("drift", "kl", False, {Split.SEARCH: 4}, is_cost=True)


def evaluation(acc: list[float], kl: list[float]) -> Evaluation:
    def scores(v: list[float]) -> Scores:
        a = np.array(v)
        return Scores((), a, float(a.mean()), float(a.std(ddof=1) / 2))

    return Evaluation(Split.SEARCH, 1.0, {"t/acc": scores(acc), "drift/kl": scores(kl)})


def test_a_cost_is_an_objective_by_name_and_no_part_of_any_mean() -> None:
    base = evaluation([0, 0, 1, 0], [0.5, 0.7, 0.4, 0.4])  # an expert "beats" this base in drift
    references = References.from_evaluations([ACC, KL], base, {"x": evaluation([1, 1, 1, 0], [0.1, 0.2, 0.1, 0.2])})
    objective = Objective(["mean_retention", "mean", "worst"], ["drift/kl"], ["drift <= 0.3"], [ACC, KL])
    merge = evaluation([1, 1, 0, 0], [0.2, 0.4, 0.2, 0.4])
    values = [v.value for v in objective.values(merge, references)]
    assert values == pytest.approx([0.5, 0.5, 0.5, 0.3])
    assert objective.violations(merge, references)["drift <= 0.3"].value == pytest.approx(0)
    assert list(objective.skills) == ["t"]
    assert Objective(["mean"], [], [], [ACC, KL]).weights(references) == {"t/acc": 1.0}


def test_a_mean_of_costs_alone_is_refused() -> None:
    with pytest.raises(StudyFileError, match="found only costs"):
        Objective(["mean"], [], [], [KL])

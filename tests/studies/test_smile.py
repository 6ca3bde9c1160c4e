"""Studies over SMILE: ranks as choices, parameters and latency as objectives, exports that our own classes load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from command_line import here
from failing_studies import Quiet
from tiny_families import nudged, save, write_family
from tiny_lm import TASKS, bound, by_lm_eval, make_model, write_tasks

from evaluators.lm_eval.packed_scorer import obstacle
from merge_search.engine.checkpoints.hashing import hash_folder
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.transforms.store import transformed
from merge_search.errors import StudyFileError
from merge_search.evaluation import Split
from merge_search.recipe import Recipe, Transform
from merge_search.search.prepare import prepare
from merge_search.search.records import Record, finished_records
from merge_search.search.run import run
from merge_search.study_file import read_study_file

JUDGE = str(Path(__file__).parent.parent / "support" / "token_judge.py") + ":TokenJudge"
SMILE = {"smile": {"rank": [2, 8], "gate_rank": 1, "top_k": 1}}
COSTS = [
    {"evaluator": "size"},
    {"evaluator": "latency", "texts": "texts.txt", "new_tokens": 2, "repeats": 1, "warm_up": 0},
]


def write_study(folder: Path, experts: dict[str, str], evaluate: list[dict[str, Any]], **more: Any) -> Path:
    (folder / "texts.txt").write_text("".join(f"the red dog {i} sings\n" for i in range(40)))
    data = {
        "study": {"name": "s"},
        "models": {"base": str(folder / "base"), "experts": experts},
        "space": {"type": "uniform", "presets": ["task_arithmetic"], "transform": SMILE},
        "evaluate": evaluate,
        "objective": {"maximise": "mean_retention", "minimise": "size/parameters", "lead": 0.0},
        "search": {"n_trials": 9, "sampler": "random", "baselines": [], "finalists": 2},
        "device": "cpu",
        **more,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def finished(path: Path) -> list[Record]:
    return finished_records(optuna.load_study(study_name="s", storage=f"sqlite:///{path.parent / 's.db'}"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two objectives over ranks, on a language model and two fine-tunes."""
    folder = tmp_path_factory.mktemp("smile")
    models = write_family(folder)
    ahead = nudged(make_model(), 1)
    with torch.no_grad():
        ahead.model.norm.weight.mul_(0.5)  # less certain than a random base: ahead of it on random rows
    save(ahead, folder / "a")
    path = write_study(folder, dict(models.experts), [{"evaluator": JUDGE}, *COSTS])
    run(read_study_file(path), Quiet())
    return path


def test_parameters_of_every_trial_are_those_of_its_model(study: Path) -> None:
    records = finished(study)
    assert all(r.is_scored for r in records), [r.reason for r in records]
    scores = [{name: s.score for name, s in r.evaluation.scores.items()} for r in records]
    plain = [s for r, s in zip(records, scores, strict=True) if r.recipe.transform is None]
    base = plain[0]["size/parameters"]
    assert {s["size/parameters"] for s in plain} == {base}
    mixtures = [(r.recipe.transform.options, s) for r, s in zip(records, scores, strict=True) if r.recipe.transform]
    assert {options["rank"] for options, _ in mixtures} == {2, 8}
    sides = 64 + 48 + 48 + 64 + 3 * 80  # in + out of q, k, v, o and of the three layers of the MLP
    for options, found in mixtures:
        added = 2 * 2 * options["rank"] * sides  # two blocks, two experts
        assert found["size/parameters"] == base + added
        assert found["size/changed"] == pytest.approx(added / (base + added))
        assert found["latency/seconds"] > 0
    assert all(math.isfinite(v) for s in scores for v in s.values())


def test_equal_transforms_are_one_merge_whatever_else_the_point_says(study: Path) -> None:
    mixtures = [r for r in finished(study) if r.recipe.transform is not None]
    assert len({r.recipe.fingerprint for r in mixtures}) == len({r.weights_sha256 for r in mixtures}) == 2


def test_an_export_loads_by_our_class_and_its_recipe_alone_gives_the_same_folder(study: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import merge_search.models  # noqa: F401

    chosen = next(r for r in finished(study) if r.recipe.transform and r.recipe.transform.options["rank"] == 8)
    here("export", study, tmp_path / "out", "--trial", str(chosen.number))
    here("merge", tmp_path / "out" / "recipe.json", tmp_path / "again")
    names = [f.name for f in sorted((tmp_path / "out").iterdir()) if f.name != "README.md"]
    assert {"config.json", "model.safetensors", "recipe.json", "tokenizer.json"} <= set(names)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert hash_folder(tmp_path / "out") == chosen.weights_sha256
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "SmileLlamaForCausalLM"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the red dog", return_tensors="pt").input_ids
    live = LiveModel.load(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, live.model(ids).logits)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert written.shape[1] > ids.shape[1]


def test_a_card_says_how_a_mixture_is_loaded(study: Path, tmp_path: Path) -> None:
    chosen = next(r for r in finished(study) if r.recipe.transform)
    here("export", study, tmp_path / "out", "--trial", str(chosen.number))
    assert "import merge_search.models" in (tmp_path / "out" / "README.md").read_text()
    here("export", study, tmp_path / "base", "--trial", "0")
    assert "merge_search.models" not in (tmp_path / "base" / "README.md").read_text()


def test_encoders_are_mixed_and_judged_with_their_heads(tmp_path: Path, encoder_folder: Path) -> None:
    from tiny_encoder import make_encoder, make_tokenizer, options

    experts = {}
    save(make_encoder(), tmp_path / "base", tokenizer=make_tokenizer())
    for i, name in enumerate(("a", "b")):
        experts[name] = str(save(nudged(make_encoder(), i, 0.3), tmp_path / name, tokenizer=make_tokenizer()))
    judges = [{"evaluator": "classification", **options(encoder_folder)}, {"evaluator": "size"}]
    path = write_study(tmp_path, experts, judges, objective={"maximise": "mean", "minimise": "size/parameters"})
    run(read_study_file(path), Quiet())
    records = finished(path)
    assert all(r.is_scored for r in records), [r.reason for r in records]
    mixtures = {r.recipe.transform.options["rank"]: r for r in records if r.recipe.transform}
    sizes = {rank: r.evaluation.scores["size/parameters"].score for rank, r in mixtures.items()}
    base = records[0].evaluation.scores["size/parameters"].score
    sides, biases = 4 * 32 + 2 * 40, 4 * 16 + 24 + 16  # four layers of attention, two of the MLP
    assert sizes == {rank: base + 2 * 2 * (rank * sides + biases) for rank in (2, 8)}
    assert len({r.weights_sha256 for r in mixtures.values()}) == 2


def test_lm_eval_scores_a_mixture_as_its_own_command_does_and_packs_nothing(tmp_path: Path) -> None:
    models = write_family(tmp_path / "models")
    transform = Transform(name="smile", options={"rank": 4, "gate_rank": 2, "top_k": 2})
    made = transformed(Recipe(models=models, transform=transform), tmp_path / "kept")
    live, folder = (
        LiveModel.load(made.base),
        write_tasks(tmp_path / "tasks", {n: TASKS[n] for n in ("t_choice", "t_generate")}),
    )
    judge = bound(folder, ["t_choice", "t_generate"], live.model)
    found = judge.evaluate(Split.SEARCH).scores
    theirs = by_lm_eval(folder, ["t_choice", "t_generate"], live.model)["results"]
    assert found["t_choice/acc"].score == theirs["t_choice"]["acc,none"]
    assert found["t_generate/exact_match"].score == theirs["t_generate"]["exact_match,first"]
    reason = obstacle(judge._live.lm)
    assert reason is not None
    assert "route" in reason


def problems_of(path: Path) -> str:
    with pytest.raises(StudyFileError) as refused:
        prepare(read_study_file(path))
    return "\n".join(refused.value.problems)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rank": [2, 64]}, "smile.rank must be at most 32, the largest that a layer has, got 64"),
        ({"rank": [2, 2.5]}, "must be a whole number"),
        ({"top_k": 3}, "smile.top_k must be at most the number of experts, 2, got 3"),
        ({"modules": ["mlp", "heads"]}, "must be one of all, attention, mlp, got 'heads'"),
        ({"gate_rank": 0}, "must lie in [1, "),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    models = write_family(tmp_path)
    space = {
        "type": "uniform",
        "presets": ["task_arithmetic"],
        "transform": {"smile": {"rank": 2, "gate_rank": 1, **options}},
    }
    path = write_study(tmp_path, dict(models.experts), [{"evaluator": JUDGE}, {"evaluator": "size"}], space=space)
    assert problem in problems_of(path)

"""Studies over transforms: experts of several shapes and kinds in one search, layers as choices, exports that load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from command_line import here
from failing_studies import Quiet
from tiny_families import add_adapter, nudged, save, scrambled, write_family
from tiny_lm import make_model

from merge_search.engine.checkpoints.hashing import hash_folder
from merge_search.errors import StudyFileError
from merge_search.evaluation import Evaluation
from merge_search.search.prepare import prepare
from merge_search.search.records import Record, finished_records, stored_references
from merge_search.search.run import run
from merge_search.study_file import read_study_file

SUPPORT = Path(__file__).parent.parent / "support"
JUDGE = str(SUPPORT / "token_judge.py") + ":TokenJudge"


def write_study(folder: Path, experts: dict[str, str], space: dict[str, Any], **more: Any) -> Path:
    search = {"n_trials": 12, "sampler": "random", "baselines": [], "finalists": 1, **more.pop("search", {})}
    data = {
        "study": {"name": "s"},
        "models": {"base": str(folder / "base"), "experts": experts},
        "space": {"type": "uniform", "presets": ["task_arithmetic"], **space},
        "evaluate": [{"evaluator": JUDGE}],
        "objective": {"maximise": "rows"},
        "search": search,
        "device": "cpu",
        **more,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def finished(path: Path) -> list[Record]:
    return finished_records(optuna.load_study(study_name="s", storage=f"sqlite:///{path.parent / 's.db'}"))


def value_of(folder: Path, name: str = "search") -> float:
    """The judge's score of a model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    from merge_search import catalogue
    from merge_search.evaluation import Split, SplitShares

    judge = catalogue.build_evaluator(JUDGE, {}, shares=SplitShares(), seed=0, folder=folder)
    judge.bind(AutoModelForCausalLM.from_pretrained(folder), None, folder=str(folder))
    return judge.evaluate(Split(name)).scores["rows/likelihood"].score


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a wide and deep fine-tune, and an adapter, in a finished study over MAL's blocks."""
    folder = tmp_path_factory.mktemp("families")
    base = save(make_model(), folder / "base")
    wide = scrambled(nudged(make_model(), 1, 0.3), seed=5, n_more=1)
    save(wide, folder / "wide")
    experts = {"wide": str(folder / "wide"), "lora": add_adapter(folder / "lora", str(base))}
    path = write_study(folder, experts, {"transform": {"mal": {"blocks": ["0 1", "1 0", "0 -"]}}})
    run(read_study_file(path), Quiet())
    return path


def test_a_fine_tune_of_another_width_and_an_adapter_are_merged_in_one_study(families: Path) -> None:
    records = finished(families)
    assert all(r.is_scored for r in records), [r.reason for r in records]
    assert [r.label for r in records[:5]] == ["base", "wide", "lora", "average", "task_arithmetic"]
    searched = {r.recipe.transform.options.get("blocks") for r in records[5:]}
    assert searched == {"0 1", "1 0", "0 -"}
    assert len({r.weights_sha256 for r in records}) == len({r.recipe.fingerprint for r in records})
    results = list((families.parent / "s.transforms").glob("*/transformed.json"))
    assert 3 <= len(results) <= 4


def test_base_and_experts_are_judged_as_they_are(families: Path) -> None:
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{families.parent / 's.db'}")
    references = {n: Evaluation.from_attribute(d["evaluation"]) for n, d in stored_references(study).items()}
    for name in ("base", "wide"):
        found = references[name].scores["rows/likelihood"].score
        assert found == pytest.approx(value_of(families.parent / name), rel=1e-4)
        assert stored_references(study)[name]["weights_sha256"] == hash_folder(families.parent / name)
    assert references["lora"].scores["rows/likelihood"].score != references["base"].scores["rows/likelihood"].score


def test_an_export_is_the_scored_model_and_so_is_its_recipe_merged_again(families: Path, tmp_path: Path) -> None:
    chosen = next(r for r in finished(families)[5:] if r.recipe.transform.options.get("blocks") == "1 0")
    here("export", families, tmp_path / "out", "--trial", str(chosen.number))
    assert hash_folder(tmp_path / "out") == chosen.weights_sha256
    here("merge", tmp_path / "out" / "recipe.json", tmp_path / "again")
    assert hash_folder(tmp_path / "again") == chosen.weights_sha256
    assert value_of(tmp_path / "out") == pytest.approx(chosen.evaluation.scores["rows/likelihood"].score, rel=1e-4)
    here("export", families, tmp_path / "wide", "--trial", "1")  # an expert of another width, as it is
    assert hash_folder(tmp_path / "wide") == hash_folder(families.parent / "wide")


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study over stacked layers, whose trials may fit their coefficients."""
    folder = tmp_path_factory.mktemp("stacked")
    models = write_family(folder)
    transform = {"stack": {"layers": ["0 1 1", "0 0 1", "0 1"]}}
    learner = {"steps": [0, 3], "per": ["block"], "step_size": 0.03, "batch_rows": 12, "warm_start": False}
    path = write_study(folder, dict(models.experts), {}, search={"n_trials": 14, "learner": learner})
    whole = {**yaml.safe_load(path.read_text()), "space": {"type": "blockwise", "transform": transform}}
    path.write_text(yaml.safe_dump(whole))
    run(read_study_file(path), Quiet())
    return path


def test_layers_are_a_choice_and_a_learner_works_through_them(stacked: Path) -> None:
    records = finished(stacked)
    assert all(r.is_scored for r in records), [r.reason for r in records]
    layers = [r.recipe.transform and r.recipe.transform.options["layers"] for r in records]
    assert set(layers) == {None, "0 1 1", "0 0 1", "0 1"}
    assert layers[:5] == [None] * 5  # base, experts and baselines
    fitted = [r for r in records if "learner" in r.attributes]
    for r in fitted:
        first, last = r.attributes["learner"]["losses"]["rows"]
        assert last < first
    assert fitted[0].recipe.transform.options["layers"] == "0 1 1"
    assert "block.2" in str(fitted[0].recipe.coefficients["a"])
    shallow = [r.recipe.coefficients for r, text in zip(records, layers, strict=True) if text == "0 1"]
    assert shallow
    assert "block.2" not in str(shallow)


def test_a_stacked_export_loads_as_a_causal_model(stacked: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    chosen = next(r for r in finished(stacked) if "learner" in r.attributes)
    here("export", stacked, tmp_path / "out", "--trial", str(chosen.number))
    assert hash_folder(tmp_path / "out") == chosen.weights_sha256
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_hidden_layers, len(model.model.layers)) == (3, 3)
    assert value_of(tmp_path / "out") == pytest.approx(chosen.evaluation.scores["rows/likelihood"].score, rel=1e-4)


def test_a_stack_is_the_base_where_nothing_is_merged(tmp_path: Path) -> None:
    """With coefficients of zero the stacked model is the base with its own layers, by transformers' own forward."""
    from merge_search.merge_recipe import merge_recipe
    from merge_search.recipe import Recipe, Transform

    models = write_family(tmp_path / "m")
    recipe = Recipe(
        models=models,
        transform=Transform(name="stack", options={"layers": "1 0 1"}),
        coefficients={"a": 0.0, "b": 0.0},
    )
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    merge_recipe(tmp_path / "recipe.json", tmp_path / "out", device="cpu")
    from transformers import AutoModelForCausalLM

    base, made = (AutoModelForCausalLM.from_pretrained(p) for p in (models.base, tmp_path / "out"))
    base.model.layers = torch.nn.ModuleList([base.model.layers[i] for i in (1, 0, 1)])
    base.config.num_hidden_layers = 3
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        assert torch.equal(base(ids, use_cache=False).logits, made(ids, use_cache=False).logits)


def test_a_transform_of_a_users_file_is_searched_and_a_final_one_fits_nothing(tmp_path: Path) -> None:
    models = write_family(tmp_path)
    space = {"transform": ["scaled", {"soup": {"share": {"bounds": [0.2, 0.8]}}}]}
    learner = {"steps": [0, 2], "per": ["expert"], "step_size": 0.1, "batch_rows": 4}
    path = write_study(
        tmp_path, dict(models.experts), space, rules=[str(SUPPORT / "user_transforms.py")], search={"learner": learner}
    )
    run(read_study_file(path), Quiet())
    records = finished(path)
    assert all(r.is_scored for r in records), [r.reason for r in records]
    soups = [r for r in records if r.recipe.transform is not None and r.recipe.transform.name == "soup"]
    assert soups
    assert not any("learner" in r.attributes for r in soups)
    assert any("learner" in r.attributes for r in records)
    here("export", path, tmp_path / "out", "--trial", str(soups[0].number))
    assert hash_folder(tmp_path / "out") == soups[0].weights_sha256
    assert (tmp_path / "out" / "rules" / "user_transforms.py").is_file()


def problems_of(path: Path) -> list[str]:
    with pytest.raises(StudyFileError) as refused:
        prepare(read_study_file(path))
    return refused.value.problems


def test_bad_transforms_are_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    models = write_family(tmp_path)
    wide = str(save(make_model(hidden_size=40, num_attention_heads=5, num_key_value_heads=1), tmp_path / "wide"))
    odd = str(save(make_model(hidden_size=64), tmp_path / "odd"))
    both = {**models.experts, "wide": wide}
    cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
        (both, {}, "wide: an expert of another width or depth can be merged once it is aligned to the base: set "
                   "space.transform: {mal: {}}"),
        (both, {"transform": ["none", "mal"]}, "space.transform: none: wide: an expert of another width"),
        (both, {"transform": {"stack": {"layers": "0 1 1"}}}, "'stack' needs fine-tunes of the base: expert 'wide'"),
        ({**both, "odd": odd}, {"transform": "mal"}, "expert 'odd'"),
        (models.experts, {"transform": {"stack": {"layers": ["0 1", "0 2"]}}}, "from 0 to 1, got 2 in '0 2'"),
        (models.experts, {"transform": {"stack": {"layer": "0 1"}}}, "no option 'layer'; did you mean 'layers'"),
        (models.experts, {"transform": "stck"}, "unknown transform 'stck'; did you mean 'stack'"),
        (models.experts, {"transform": {"stack": {"layers": {"bounds": [0, 1]}}}}, "has no range"),
        (models.experts, {"transform": []}, "names no transform"),
        (models.experts, {"transform": ["mal", "mal"]}, "stands twice"),
    ]  # fmt: skip
    for experts, space, problem in cases:
        found = problems_of(write_study(tmp_path, dict(experts), space))
        assert any(problem in p for p in found), (space, found)


def test_a_learner_that_always_fits_needs_something_to_merge(tmp_path: Path) -> None:
    models = write_family(tmp_path)
    learner = {"steps": [2], "per": ["expert"], "step_size": 0.1, "batch_rows": 4}
    path = write_study(tmp_path, dict(models.experts), {"transform": "alone"}, search={"learner": learner})
    assert any("alone leaves nothing to merge" in p for p in problems_of(path))


def test_a_judge_that_cannot_load_an_expert_is_told_before_the_search(tmp_path: Path, encoder_folder: Path) -> None:
    from tiny_encoder import make_encoder, make_tokenizer, options

    for name, hidden in (("base", 16), ("wide", 32)):
        save(make_encoder(hidden), tmp_path / name, tokenizer=make_tokenizer())
    path = write_study(
        tmp_path,
        {"wide": str(tmp_path / "wide")},
        {"transform": "mal"},
        evaluate=[{"evaluator": "classification", **options(encoder_folder)}],
        objective={"maximise": "mean"},
    )
    found = problems_of(path)
    assert any("its heads must have the base's size, 8, got 16" in p for p in found)
    assert any("hidden size 16, and expert 'wide' has 32: it cannot be judged" in p for p in found)


def test_values_of_a_stack_repeat_the_bases_own(stacked: Path) -> None:
    """Trials of the same recipe have the same weights, whatever was scored between them."""
    by_fingerprint: dict[str, set[str]] = {}
    for r in finished(stacked):
        by_fingerprint.setdefault(r.recipe.fingerprint, set()).add(r.weights_sha256)
    assert all(len(hashes) == 1 for hashes in by_fingerprint.values())
    assert np.isfinite([r.values[0] for r in finished(stacked)]).all()

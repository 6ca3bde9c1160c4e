"""Statistics from data: checks before any work, files made elsewhere, exports, and their use in a study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from token_bench import OWNERS, Bench, apply

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics.provider import DataStatistics
from merge_search.engine.statistics.store import FOLDER, FolderStatistics
from merge_search.errors import RecipeError, WeightsError
from merge_search.evaluation import Split
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe
from merge_search.search.prepare import prepare
from merge_search.search.start.baselines import baselines
from merge_search.search.trial.worker import Worker, statistics_of
from merge_search.study_file import read_study_file

# --- checks before work, files of others, exports


def test_a_recipe_whose_data_are_unavailable_is_refused_before_any_weight_is_read(bench: Bench) -> None:
    fisher = preset("fisher", bench.pool.models)
    regmean = Recipe.model_validate(
        {"models": bench.pool.models, "operator": {"name": "regmean"}, "coefficients": {"a": 1.0, "b": 1.0}}
    )
    engine = MergeEngine(bench.pool)
    assert engine.check(fisher) == engine.check(regmean) == []
    assert bench.statistics.questions == 0
    bench.tasks.rows = {}
    bare = Bench(bench.pool, bench.live, bench.folder)
    bare.tasks.rows = {}
    for recipe, who in ((fisher, "measure 'fisher'"), (regmean, "operator: 'regmean'")):
        (problem,) = engine.check(recipe)
        assert who in problem
        assert "give tasks a training split, or set splits.fit" in problem
    bench.pool.statistics = None
    assert "none were measured" in engine.check(regmean)[0]


def test_scores_made_elsewhere_are_read_from_the_studys_folder(bench: Bench) -> None:
    recipe = preset("external", bench.pool.models)
    engine = MergeEngine(bench.pool)
    assert len(engine.check(recipe)) == 2
    assert "there is no file" in engine.check(recipe)[0]
    draw = torch.Generator().manual_seed(1)
    for expert in "ab":
        (bench.folder / "external").mkdir(parents=True, exist_ok=True)
        scores = {n: torch.rand(bench.pool.base(n).shape, generator=draw) for n in bench.pool.groups}
        save_file(scores, bench.folder / "external" / f"{expert}.safetensors")
    assert engine.check(recipe) == []
    engine.apply(recipe, bench.live.views)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (bench.live.views[name] != bench.pool.base(name)).float().mean()
    assert float(moved) > 0.7
    assert bench.statistics.questions == 0
    assert f"{FOLDER}/external/a.safetensors" in bench.statistics.files()
    scores["lm_head.weight"][0] = torch.nan
    save_file(scores, bench.folder / "external" / "b.safetensors")
    with pytest.raises(WeightsError, match=r"'lm_head.weight' must be floating and finite"):
        FolderStatistics(bench.folder).get("external", "b", "lm_head.weight")


def test_a_recipe_cannot_name_a_file_outside_the_folder(bench: Bench) -> None:
    assert FolderStatistics(bench.folder).path("../external", "a") is None
    assert "there is no file" in bench.statistics.problem("fisher@nan", "a")


def test_an_export_merges_again_from_its_own_files_and_a_study_from_its_cache(bench: Bench, tmp_path: Path) -> None:
    recipe = preset("df_merge", bench.pool.models)
    merged = apply(bench, recipe)
    for target, source in bench.statistics.files().items():
        copy = tmp_path / "export" / target
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(Path(source).read_bytes())
    pool = ModelPool(bench.pool.models, device="cpu")
    with pytest.raises(RecipeError, match="none were measured"):
        list(MergeEngine(pool).merged(recipe))
    cached = DataStatistics(pool, None, [bench.tasks], OWNERS, folder=bench.folder)
    for source in (
        FolderStatistics(tmp_path / "export" / FOLDER),
        cached,
    ):  # the cache comes last, because the check below reads it
        pool.statistics = source
        assert MergeEngine(pool).check(recipe) == []
        assert all(torch.equal(t, merged[n]) for n, t in MergeEngine(pool).merged(recipe))
    other = preset("df_merge", bench.pool.models, coefficients={"a": 0.1, "b": 0.1})
    assert "was not measured in this study" in MergeEngine(pool).check(other)[0]


def test_matrices_stored_the_other_way_round_keep_their_inputs(tmp_path: Path) -> None:
    """GPT-2 stores (in, out): the Gram matrix is (in, in), and RegMean's gradient is zero there too."""
    config = transformers.GPT2Config(
        vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_inner=40, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    models = Models(base=str(tmp_path / "base"), experts={e: str(tmp_path / e) for e in "ab"})
    bench = Bench(ModelPool(models, device="cpu"), LiveModel.load(tmp_path / "base"), tmp_path / "s")
    (name,) = [n for n in bench.pool.groups if n.endswith("mlp.c_fc.weight")]
    assert bench.pool.base(name).shape == (16, 40)
    grams = [bench.statistics.get("gram", e, name) for e in "ab"]
    norm = bench.statistics.get("activation_norm", "a", name)
    assert norm is not None
    assert grams[0] is not None
    torch.testing.assert_close(norm, grams[0].diagonal().sqrt()[:, None])
    operator = {"name": "regmean", "options": {"alpha": 1.0, "ridge": 1e-9}}
    recipe = Recipe.model_validate({"models": models, "operator": operator, "coefficients": {"a": 1.0, "b": 1.0}})
    merged = apply(bench, recipe)[name].double()
    terms = [
        g.double() @ (merged - bench.pool.expert(e, name)) for g, e in zip(grams, "ab", strict=True) if g is not None
    ]
    assert float(sum(terms).norm()) < 1e-3 * float(terms[0].norm())  # type: ignore[union-attr]


# --- in a study


def test_a_study_measures_on_its_fit_rows_charges_for_them_and_starts_from_presets_with_data(
    demo: Path, tmp_path: Path
) -> None:
    """Runs the demo's real models and tasks through lm-eval."""
    tasks = {"demo_maths": "maths", "demo_spelling": "spelling"}
    experts = {e: str(demo / "models" / e) for e in tasks.values()}
    lm_eval = {
        "evaluator": "lm_eval",
        "tasks": list(tasks),
        "include_path": str(demo / "tasks"),
        "limit": 30,
        "fit_limit": 6,
    }
    study = {
        "study": {"name": "tiny"},
        "models": {"base": str(demo / "models" / "base"), "experts": experts, "dtype": "float32"},
        "space": {"type": "uniform"}, "evaluate": [lm_eval], "splits": {"search": 0.6, "fit": 0.3},
        "search": {"baselines": ["fisher", "ties"]}, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    plan = prepare(read_study_file(tmp_path / "study.yaml"))
    bench = Worker(plan, device="cpu")
    assert "fisher" not in baselines(plan.context, plan.baselines, can_measure=bench.can_measure)
    bench.set_teachers(tasks)
    recipe = baselines(plan.context, plan.baselines, can_measure=bench.can_measure)["fisher"]
    plain = bench.score(preset("average", plan.context.models), Split.SEARCH)
    first = bench.score(recipe, Split.SEARCH)
    second = bench.score(recipe, Split.SEARCH)
    n_fit = sum(plan.evaluators[0].fit_tasks().values())  # type: ignore[attr-defined]
    assert 0 < n_fit <= 12
    assert first.evaluation.cost.questions == plain.evaluation.cost.questions + 3 * n_fit
    assert second.evaluation.cost.questions == plain.evaluation.cost.questions
    assert first.weights_sha256 == second.weights_sha256 != plain.weights_sha256
    assert len(list((tmp_path / "tiny.statistics").glob("*.safetensors"))) == 2
    pool = ModelPool(plan.context.models, device="cpu")
    pool.statistics = statistics_of(plan, pool, tasks, None)  # as in an export, without a live model
    exported = dict(MergeEngine(pool).merged(recipe))
    assert all(torch.equal(exported[n], bench.views[n]) for n in exported)

"""Baselines that fit their own coefficients: AdaMerging by name, from the study file to its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from command_line import here
from small_spaces import CONTEXT

from merge_search.presets import PRESETS
from merge_search.search.budget import questions_asked
from merge_search.search.records import Record, finished_records
from merge_search.search.start.baselines import UNASKED, baselines, read_baselines

EXPERTS = ("maths", "stories", "spelling")


def test_adamerging_has_the_releases_settings_and_deltas_that_are_plain_or_trimmed() -> None:
    problems: list[str] = []
    names = ["adamerging", "adamerging_layer", "adamerging_pp", "adamerging_layer_pp"]
    named = read_baselines(names, problems)
    assert problems == []
    wanted = {"loss": "entropy", "clamp": [0.0, 1.0], "steps": 500, "step_size": 1e-3, "batch_rows": 16, "average": 0.0}
    fits = [b.fit.settings for b in named if b.fit]
    assert fits == [{**wanted, "per": per} for per in ("expert", "tensor", "expert", "tensor")]
    plain, _, trimmed, _ = (baselines(CONTEXT, named)[name] for name in names)
    arithmetic = baselines(CONTEXT, [])["task_arithmetic"]
    assert plain.fingerprint == arithmetic.fingerprint  # base + 0.3 times the sum of deltas
    ties = baselines(CONTEXT, ["ties_sum"])["ties_sum"]  # trimmed to 0.2, elected, summed
    assert trimmed.model_copy(update={"scale": 0.3, "coefficients": ties.coefficients}).fingerprint == ties.fingerprint


def test_options_of_a_fitted_baseline_are_part_of_its_name_and_of_its_fit() -> None:
    problems: list[str] = []
    (one,) = read_baselines([{"adamerging_pp": {"start": 0.5, "density": 0.4, "loss": "gold"}}], problems)
    assert problems == []
    assert one.label == "adamerging_pp(start=0.5, density=0.4, loss=gold)"
    recipe = baselines(CONTEXT, [one])[one.label]
    assert set(recipe.coefficients.values()) == {0.5}
    assert set(recipe.densities.values()) == {0.4}


def test_a_published_baseline_may_have_another_coefficient() -> None:
    problems: list[str] = []
    plain, longer = read_baselines(["tsv_m", {"tsv_m": {"coefficient": 1.5}}], problems)
    assert problems == []
    assert longer.label == "tsv_m(coefficient=1.5)"
    recipes = baselines(CONTEXT, [plain, longer])
    assert set(recipes["tsv_m"].coefficients.values()) == {1.0}
    assert set(recipes[longer.label].coefficients.values()) == {1.5}


def test_baselines_that_nobody_asked_for_need_prompts_where_they_read_any() -> None:
    named = read_baselines(UNASKED, [])
    assert [b.label for b in named] == ["tsv_m", "regmean_parts", "regmean_parts(coefficient=1.5)"]
    asked = []

    def can_measure(kind: str) -> bool:
        asked.append(kind)
        return kind.startswith("prompt_gram")

    assert "regmean_parts" not in baselines(CONTEXT, named)
    assert {b.label for b in named} < baselines(CONTEXT, [*named, "fisher"], can_measure=can_measure).keys()
    assert "fisher" not in baselines(CONTEXT, ["fisher"], can_measure=can_measure)
    assert asked == ["prompt_gram@prompts=64"] * 2 + ["fisher"] * 2


def test_what_is_wrong_with_baselines_is_said_all_at_once() -> None:
    problems: list[str] = []
    entries: list[Any] = [
        "tyes", {"adamerging": {"stepz": 3, "steps": 0}}, {"ties": {"density": 0.2}},
        {"adamerging": {}, "ties": {}}, {"adamerging": {"clamp": [1, 0]}},
    ]  # fmt: skip
    assert read_baselines(entries, problems) == []
    text = "\n".join(problems)
    assert "search.baselines: no preset is called 'tyes'; did you mean 'ties'?" in text
    assert "search.baselines.1.adamerging.stepz: " in text
    assert "search.baselines.1.adamerging.steps: " in text
    assert "search.baselines.2.ties.density: " in text
    assert "search.baselines.3: write NAME or {NAME: {option: value}}" in text
    assert "clamp must be [low, high] with low < high, got [1.0, 0.0]" in text


def test_a_fitted_preset_is_no_choice_of_a_space(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, space={"type": "uniform", "presets": ["adamerging"]})
    result = here("validate", path, check=False)
    assert result.returncode == 2
    assert "'adamerging' fits its own coefficients; list it under search.baselines" in result.stderr
    assert {n for n, p in PRESETS.items() if p.fit} == {
        "adamerging", "adamerging_layer", "adamerging_pp", "adamerging_layer_pp"
    }  # fmt: skip


def test_a_fitted_baseline_that_cannot_be_fitted_is_refused_before_a_weight_is_read(demo: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, demo, baselines=[{"adamerging": {"loss": "choice"}}], evaluate={"fit": "search"})
    text = here("validate", path, check=False).stderr
    assert "'adamerging(loss=choice)' is fitted, and task 'demo_maths' has no rows to fit on" in text
    assert "is fitted: task 'demo_maths' has no loss 'choice'; it has gold, pseudo, kl, entropy" in text


def write_study(folder: Path, demo: Path, **changes: Any) -> Path:
    evaluate = {
        "evaluator": "lm_eval", "tasks": [f"demo_{e}" for e in EXPERTS], "include_path": str(demo / "tasks"),
        "batch_size": 64, "limit": 60, "fit_limit": 64, **changes.pop("evaluate", {}),
    }  # fmt: skip
    space = changes.pop("space", {"type": "compatibility", "presets": ["task_arithmetic"]})
    if space["type"] == "compatibility":
        space = {**space, "coefficients": {"per": "expert", "bounds": [0, 1.5]}}
    data = {
        "study": {"name": "fitted", "seed": 1},
        "models": {
            "base": str(demo / "models" / "base"),
            "experts": {e: str(demo / "models" / e) for e in EXPERTS},
            "dtype": "float32",
        },
        "space": space,
        "evaluate": [evaluate],
        "search": {"baselines": [], "finalists": 1, "sampler": "random", "n_trials": 9, **changes},
        "device": "cpu",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def trials(path: Path) -> tuple[optuna.Study, list[Record]]:
    study = optuna.load_study(study_name="fitted", storage=f"sqlite:///{path.parent / 'fitted.db'}")
    return study, finished_records(study)


def test_a_study_tries_adamerging_and_goes_on_from_its_result(demo: Path, tmp_path: Path) -> None:
    quick = {"steps": 3, "step_size": 0.02, "batch_rows": 4}
    layer = {"adamerging_layer_pp": {**quick, "loss": "gold"}}
    path = write_study(tmp_path, demo, baselines=[{"adamerging": quick}, layer])
    here("run", path)
    study, done = trials(path)
    task_wise, layer_wise = (r for r in done if r.label.startswith("adamerging"))
    scoring = sum(len(s.values) for s in task_wise.evaluation.scores.values())
    assert task_wise.cost.questions == scoring + 3 * 4 * (4 + 3 + 4)  # two tasks generate their answers first
    assert layer_wise.cost.questions == scoring + 3 * 4 * (3 + 3 + 3)
    coefficients = task_wise.recipe.coefficients
    assert all(isinstance(c, float) and c != 0.3 and abs(c - 0.3) < 0.061 for c in coefficients.values())
    assert all(isinstance(c, dict) and len(c) > 20 for c in layer_wise.recipe.coefficients.values())
    # The space holds coefficients per expert, so the result is a point of it, with scores that are known.
    first = next(r for r in done if r.attributes.get("start") == "start.0")
    assert first.recipe.coefficients == pytest.approx(dict(coefficients))
    assert first.attributes["same_as"] == task_wise.number
    assert (first.cost.questions, first.values) == (0, task_wise.values)
    assert questions_asked(study) == sum(
        r.cost.questions for r in done if r.label not in ("base", *EXPERTS)
    ) + scoring * (1 + len(EXPERTS))
    before = [(r.number, r.recipe) for r in done]
    here("run", path)
    assert [(r.number, r.recipe) for r in trials(path)[1]] == before


def test_a_learner_goes_on_from_adamerging_where_it_is_the_best_of_its_structure(demo: Path, tmp_path: Path) -> None:
    fit = {"adamerging_layer": {"steps": 12, "step_size": 0.05, "loss": "gold", "clamp": None}}
    learner = {"per": "tensor", "steps": [0, 1], "step_size": 1e-6, "batch_rows": 4}
    path = write_study(tmp_path, demo, baselines=[fit], learner=learner)
    here("run", path)
    done = trials(path)[1]
    fitted = next(r for r in done if r.label.startswith("adamerging"))
    first = next(r for r in done if not r.label and "learner" in r.attributes)
    alike = [r for r in done if r.label == "average" or r.label == "task_arithmetic"]
    assert fitted.values[0] > max(r.values[0] for r in alike)
    assert first.attributes["learner"]["began_at"] == fitted.number
    for expert, by_tensor in first.recipe.coefficients.items():
        assert isinstance(by_tensor, dict)
        assert by_tensor == pytest.approx(dict(fitted.recipe.coefficients[expert]), abs=1e-5)  # type: ignore[arg-type]

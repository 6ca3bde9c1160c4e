"""A fit goes on from the best trial of its structure, and where options are searched, from one with other numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from merge_search.objective import Objective
from merge_search.presets import preset
from merge_search.recipe import Models, Recipe
from merge_search.search.start import warm_start as module

MODELS = Models(base="b", experts={"x": "x", "y": "y"})


def tsv(share: float, coefficient: float, **options: Any) -> Recipe:
    operator = {"name": "tsv_m", "options": {"rank_share": share, **options}}
    return preset("tsv_m", MODELS, coefficients=coefficient, operator=operator)


def record(recipe: Recipe, value: float, label: str = "") -> Any:
    return SimpleNamespace(recipe=recipe, values=(value,), label=label)


def started(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, *records: Any) -> float | None:
    """The coefficient at which the fit begins; None where no trial is taken."""
    monkeypatch.setattr(module, "candidates", lambda study: list(records))
    objective: Any = SimpleNamespace(key=lambda values: values[0], __class__=Objective)
    found, taken = module.warm_start(recipe, None, objective)  # type: ignore[arg-type]
    assert found.operator == recipe.operator
    return None if taken is None else float(found.coefficients["x"])  # type: ignore[arg-type]


def test_trials_with_the_same_options_come_before_better_ones_with_other_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same, near = record(tsv(0.5, 0.1), 0.6), record(tsv(0.7, 0.2), 0.9)
    assert started(monkeypatch, tsv(0.5, 1.0), same, near) == 0.1


def test_without_one_the_best_that_differs_in_numbers_alone_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [record(tsv(0.7, 0.2), 0.8), record(tsv(0.9, 0.3), 0.9), record(preset("tsv_m", MODELS), 0.1)]
    unlike = [record(tsv(0.5, 0.4, embeddings=False), 1.0), record(preset("iso_c", MODELS), 1.0)]
    assert started(monkeypatch, tsv(0.5, 1.0), *others, *unlike) == 0.3
    assert started(monkeypatch, tsv(0.5, 1.0), *unlike) is None
    assert started(monkeypatch, tsv(0.5, 1.0), record(preset("average", MODELS), 0.95, "average"), *others) is None

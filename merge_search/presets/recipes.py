"""The table of presets, and recipes made from it. torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from merge_search.errors import RecipeError, nearest
from merge_search.presets.published import PUBLISHED
from merge_search.presets.row import Preset
from merge_search.recipe import Models, Recipe
from merge_search.recipe_options import options_of, value_at
from merge_search.rules import Origin, RuleTable
from merge_search.rules.describe import OptionLine, option_line
from merge_search.rules.table import register

__all__ = ["PRESETS", "add_preset", "preset", "preset_options"]

Values = float | Mapping[str, Any]

PRESETS: RuleTable[Preset] = RuleTable("preset", PUBLISHED)


def add_preset(name: str, summary: str, settings: Mapping[str, Any], *, paper: str = "-", **rest: Any) -> Preset:
    """Add a preset from outside: in a rule file, an installed package, or this process.

    Args:
        name: The name that study files use.
        summary: One line.
        settings: `Recipe` fields, which may name rules of the same file.
        paper: Where it was published.
        **rest: Other attributes of `Preset` (``coefficient``, ``density``, ``scale``, ``needs_data``, ``experts``).

    Raises:
        RuleError: the name is taken.
    """
    frame = sys._getframe(1)
    origin = Origin(frame.f_code.co_filename, frame.f_lineno)
    added = Preset(name, summary, paper, settings, origin=origin, **rest)
    register(PRESETS, added)
    return added


def preset(
    name: str,
    models: Models,
    *,
    coefficients: Values | str | None = None,
    densities: Values | None = None,
    scale: float | Mapping[str, float] | None = None,
    **overrides: Any,
) -> Recipe:
    """The recipe of a published method over `models`.

    Args:
        name: One of `PRESETS`.
        models: Base and experts.
        coefficients: One number for all experts, or by expert (a number or a value per group); ``mean`` is
            1 / number of experts; None: the preset's.
        densities: One number for all experts, or by expert; None: the preset's.
        scale: lambda_out, a number or a value per group; None: the preset's.
        **overrides: `Recipe` fields that replace the preset's (``select={...}``, ``seed=3``); for ``expert`` also
            ``expert="name"``.

    Raises:
        RecipeError: the name is unknown, the method cannot take so many experts, or a value is invalid.
    """
    if name not in PRESETS:
        raise RecipeError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    p = PRESETS[name]
    n, (low, high) = len(models.experts), p.experts
    if n < low or (high is not None and n > high):
        raise RecipeError(
            f"preset {name!r} needs {f'{low} or more' if high is None else f'{low} to {high}'} experts, got {n}"
        )
    settings: dict[str, Any] = {**p.settings}
    if name == "expert":
        settings["operator"] = {
            "name": "passthrough",
            "options": {"expert": _one_expert(models, overrides.pop("expert", None))},
        }
    if name not in ("base", "expert"):
        settings["coefficients"] = _by_expert(models, p.coefficient if coefficients is None else coefficients)
        chosen = p.density if densities is None else densities
        settings["densities"] = {} if chosen is None else _by_expert(models, chosen)
        settings["scale"] = _scale(p, n) if scale is None else scale
    where = f"preset {name!r}"
    recipe = Recipe.from_dict({"models": models, "preset": name, **settings, **overrides}, where=where)
    if p.origin is not None and (unknown := recipe.unknown_rules()):
        raise RecipeError(unknown, where=f"{p.origin}: {where}")
    return recipe


def preset_options(name: str) -> list[tuple[str, OptionLine]]:
    """(rule, line) of every option that a study file may give to a preset, with the preset's values as defaults.

    Args:
        name: One of `PRESETS`.
    """
    low, _ = PRESETS[name].experts
    experts = [f"expert{i}" for i in range(low)]
    chosen: dict[str, Any] = {"expert": experts[0]} if name == "expert" else {}
    recipe = preset(name, Models(base="base", experts={e: e for e in experts}), **chosen)
    data = recipe.model_dump()
    out = []
    for option, (place, *_) in options_of(recipe).items():
        line = option_line(place.rule, place.option, value_at(data, place.home, place.absent))
        out.append((place.rule.name, line._replace(option=option)))
    return out


def _scale(p: Preset, n_experts: int) -> float:
    return float(n_experts) if p.name == "df_merge" else p.scale


def _one_expert(models: Models, expert: str | None) -> str:
    if expert is None and len(models.experts) == 1:
        return next(iter(models.experts))
    if expert not in models.experts:
        raise RecipeError(f"preset 'expert' needs expert=<name>, got {expert!r}{nearest(str(expert), models.experts)}")
    return expert


def _by_expert(models: Models, values: Values | str) -> dict[str, Any]:
    if isinstance(values, Mapping):
        return dict(values)
    number = 1.0 / len(models.experts) if values == "mean" else float(values)
    return dict.fromkeys(models.experts, number)

"""Baselines of every search, which it begins with: base, experts, average, task arithmetic and published presets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from merge_search.presets import PRESETS, preset
from merge_search.recipe import Recipe, Transform
from merge_search.space import SpaceContext

__all__ = ["ALWAYS", "baselines", "fits", "reference_recipes"]

ALWAYS = ("average", "task_arithmetic")
"""Presets that every study tries, whatever its file names."""


def reference_recipes(context: SpaceContext) -> dict[str, Recipe]:
    """Recipes of exact copies of the base and of each expert, by name."""
    if context.transform is not None:  # experts of other shapes are judged as they are, on models of their own
        alone = {name: Transform(name="alone", options={"model": name}) for name in context.experts}
        return {n: context.recipe(transform=t) for n, t in {"base": Transform(name="alone"), **alone}.items()}
    out = {"base": _preset("base", context)}
    return out | {expert: _preset("expert", context, expert=expert) for expert in context.experts}


def baselines(
    context: SpaceContext, names: list[str], *, can_measure: Callable[[], bool] = lambda: False
) -> dict[str, Recipe]:
    """Recipes of the references, the average and task arithmetic, then of the presets `names` at their published
    settings.

    Args:
        context: The models.
        names: Names of presets. Those that do not take this many experts are left out.
        can_measure: Says whether presets that need statistics from data can have them. It is called only if one is
            named.
    """
    chosen = dict.fromkeys([*ALWAYS, *names])
    has_data = any(PRESETS[name].needs_data for name in chosen) and can_measure()
    kept = [name for name in chosen if fits(name, context, has_data=has_data)]
    return reference_recipes(context) | {name: _preset(name, context) for name in kept}


def fits(name: str, context: SpaceContext, *, has_data: bool = False) -> bool:
    """Whether a preset takes this many experts, and has data if it needs any."""
    low, high = PRESETS[name].experts
    n = len(context.experts)
    return low <= n and (high is None or n <= high) and (has_data or not PRESETS[name].needs_data)


def _preset(name: str, context: SpaceContext, **settings: Any) -> Recipe:
    recipe = preset(name, context.models, seed=context.seed, dtype=context.dtype, **settings)
    return recipe.model_copy(update={"transform": context.transform})

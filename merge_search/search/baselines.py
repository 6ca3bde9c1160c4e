"""What every search is compared with, and begins with: base, experts, average, task arithmetic, published presets."""

from __future__ import annotations

from typing import Any

from merge_search.presets import PRESETS, preset
from merge_search.recipe import Recipe
from merge_search.space import SpaceContext

__all__ = ["baselines", "fits", "reference_recipes"]


def reference_recipes(context: SpaceContext) -> dict[str, Recipe]:
    """``base`` and each expert, as exact copies."""
    out = {"base": _preset("base", context)}
    return out | {expert: _preset("expert", context, expert=expert) for expert in context.experts}


def baselines(context: SpaceContext, names: list[str]) -> dict[str, Recipe]:
    """References, the average, task arithmetic, then the presets `names` at their published settings."""
    chosen = dict.fromkeys(["average", "task_arithmetic", *names])
    return reference_recipes(context) | {name: _preset(name, context) for name in chosen if fits(name, context)}


def fits(name: str, context: SpaceContext) -> bool:
    """Whether a preset takes this many experts and needs no data."""
    low, high = PRESETS[name].experts
    n = len(context.experts)
    return low <= n and (high is None or n <= high) and not PRESETS[name].needs_data


def _preset(name: str, context: SpaceContext, **settings: Any) -> Recipe:
    return preset(name, context.models, seed=context.seed, dtype=context.dtype, **settings)

"""What every search is compared with, and begins with: base, experts, average, task arithmetic, published presets."""

from __future__ import annotations

from merge_search.presets import PRESETS, preset
from merge_search.recipe import Recipe
from merge_search.space import SpaceContext

__all__ = ["baselines", "reference_recipes"]


def reference_recipes(context: SpaceContext) -> dict[str, Recipe]:
    """``base`` and each expert, as exact copies."""
    models = context.models
    out = {"base": preset("base", models)}
    for expert in context.experts:
        recipe = preset("expert", models)
        assert recipe.operator is not None
        operator = recipe.operator.model_copy(update={"options": {"expert": expert}})
        out[expert] = recipe.model_copy(update={"operator": operator})
    return {k: _in(context, r) for k, r in out.items()}


def baselines(context: SpaceContext, names: list[str]) -> dict[str, Recipe]:
    """References, the average, task arithmetic, then the presets `names` at their published settings."""
    out = reference_recipes(context)
    for name in dict.fromkeys(["average", "task_arithmetic", *names]):
        if PRESETS[name].fits(len(context.experts)):
            out[name] = _in(context, preset(name, context.models))
    return out


def _in(context: SpaceContext, recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"seed": context.seed, "dtype": context.dtype})

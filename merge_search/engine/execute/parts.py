"""The parts of a merge that is linear in its coefficients: one processed delta per expert.

    merged = base + sum_i lambda_i part_i          part_i = d merged / d lambda_i at fixed masks
                                                          = scale * omega_i / lambda_i * rho_i m_i c_i tau_i

Slopes are inner products of gradients with these parts, and learners move coefficients along them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_search.engine.contracts import Pass
from merge_search.engine.execute.runner import scalars, sweep
from merge_search.engine.methods.assess import measure_of
from merge_search.engine.methods.primitives import EAGER
from merge_search.engine.methods.stages import combine, elect, survivors
from merge_search.errors import RecipeError
from merge_search.recipe import Recipe
from merge_search.rules import OPERATORS, SPLICES

__all__ = ["linearity_problems", "pass_parts", "unit_recipe"]


def linearity_problems(recipe: Recipe) -> list[str]:
    """Reasons why the merged weights are not linear in the recipe's coefficients; empty if they are."""
    problems = [f"post rule {rule.name!r} is not linear in the combined delta" for rule in recipe.post]
    if recipe.operator is not None:
        info = OPERATORS.get(recipe.operator.name)
        if info is None or not info.decomposing:
            problems.append(f"operator {recipe.operator.name!r} gives no part per expert")
        return problems
    splice = SPLICES.get(recipe.splice.kind)
    if splice is not None and not splice.is_linear:
        reason = "divides by the coefficients" if splice.divides_by_coefficients else "is not declared linear in them"
        problems.append(f"splice {splice.name!r} {reason}")
    if recipe.resolve.kind != "none" and recipe.resolve.weighted:
        problems.append("a weighted election depends on the coefficients (resolve.weighted)")
    for assess in (recipe.assess, recipe.splice.score):
        if assess is not None and measure_of(assess).depends_on_coefficients(assess.options):
            problems.append(
                f"measure {assess.measure!r} is taken at the scaled model, so it depends on the coefficients"
            )
    return problems


def unit_recipe(recipe: Recipe) -> Recipe:
    """`recipe` with every coefficient 1 and no maps. Its passes give the parts.

    Raises:
        RecipeError: The merge is not linear in its coefficients.
    """
    if problems := linearity_problems(recipe):
        raise RecipeError(
            [*problems, "slopes and learners need a merge that is linear in its coefficients"],
            where=f"recipe {recipe.preset!r}" if recipe.preset else "recipe",
        )
    return recipe.model_copy(update={"coefficients": {}, "maps": {}})


def pass_parts(p: Pass, base: Tensor, experts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Parts of the experts of a pass that was planned with unit coefficients.

    Each part is the pass with the other experts' coefficients at zero. Selection and election run once for all parts.

    Args:
        p: The pass.
        base: Flat.
        experts: Flat, in the order of the pass.
        device: Where arithmetic happens.

    Returns:
        float32, shape (experts, *shape), scale included.
    """
    s, n = p.structure, scalars(p.numbers, device)
    out = torch.empty(len(p.experts), base.numel(), device=device)
    nothing = torch.zeros((), device=device)
    for where, b, e, given, index in sweep(p, base, experts, device):
        origin = b.to(torch.float32)
        left = survivors(s, origin, e, given, n, index, EAGER)
        agreed = elect(s, left.x, n, EAGER)
        for i, unit in enumerate(n["coefficient"]):
            alone = [unit if j == i else nothing for j in range(s.experts)]
            out[i, where] = n["scale"][0] * combine(s, origin, left, agreed, given, {**n, "coefficient": alone}, EAGER)
    return out.reshape(len(p.experts), *p.shape)

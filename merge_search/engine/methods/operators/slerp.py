"""SLERP: along the great circle between two tensors."""

from __future__ import annotations

from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.sphere import interpolate, merged_weights, points, weights

__all__ = ["merge"]

_LERP_ABOVE = 0.9995
"""|cos| above which mergekit goes along a straight line."""


def merge(context: OperatorContext) -> Tensor:
    """sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b, where w is the angle between the flattened tensors.

    With two experts a and b are these; with one they are base and expert.

    Options: ``t``, taken from the coefficients by default (c_2 / (c_1 + c_2), or c_1 of a single expert), which may
    vary by group. ``space``: join weights (as published) or deltas.

    Returns:
        float32 weights, moved by `scale` from the base. The path is straight where |cos w| > 0.9995 or a vector is
        zero.
    Raises:
        RecipeError: A coefficient is negative.
    Source: Shoemake 1985; mergekit's ``slerp``.
    """
    if not any(context.active):
        return context.base.clone()
    ends = points(context)
    if len(ends) == 1:
        start = context.base if context.options["space"] == "weights" else context.base.new_zeros(context.base.shape)
        ends, t = [start, ends[0]], context.coefficients[0]
    else:
        shares = weights(context)
        if not shares and "t" not in context.options:
            return context.base.clone()
        t = shares[1] if shares else 0.0
    if "t" in context.options:
        t = context.number("t")
    return merged_weights(context, interpolate(ends[0], ends[1], t, lerp_above=_LERP_ABOVE))

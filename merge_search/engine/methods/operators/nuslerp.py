"""NuSLERP: SLERP of two experts' deltas by normalised weights, whole, by row or by column."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.sphere import interpolate, merged_weights, points, weights

__all__ = ["merge"]

_LERP_ABOVE = 1 - 1e-7
"""|cos| above which the path is a straight line: the sine has no digits left there. The angle itself is exact."""


def merge(context: OperatorContext) -> Tensor:
    """SLERP with t = c_2 / (c_1 + c_2), on deltas (as published where a base is given) or weights.

    With a single expert the path starts at the base, with t = c_1.

    Options: ``space``: join weights or deltas. ``axis``: the vectors are the whole tensor, the rows (one per output) or
    the columns of a matrix. Tensors of one dimension are taken whole. Stacks and transposed storage are taken into
    account.

    Returns:
        float32 weights, moved by `scale` from the base; the base where both coefficients are zero.
    Raises:
        RecipeError: A coefficient is negative.
    Source: mergekit's ``nuslerp``.
    """
    if not any(context.active):
        return context.base.clone()
    experts = points(context)
    if len(experts) == 1:
        start = context.base if context.options["space"] == "weights" else torch.zeros_like(context.base)
        (a, b), shares = (start, experts[0]), [0.0, context.coefficients[0]]
    else:
        a, b = experts
        shares = weights(context)
    if not shares:
        return context.base.clone()
    axis = None
    if context.options["axis"] != "tensor" and context.base.ndim > 1:
        axis = -1 if (context.options["axis"] == "row") != context.transposed else -2
    return merged_weights(context, interpolate(a, b, shares[1], lerp_above=_LERP_ABOVE, axis=axis))

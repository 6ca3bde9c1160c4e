"""Multi-SLERP: the mean direction of all experts times their mean norm."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.sphere import merged_weights, norm, points, unit, weights

__all__ = ["merge"]

_OPPOSED = 1e-6
"""Length of a mean of unit vectors below which it has no direction."""


def merge(context: OperatorContext) -> Tensor:
    """m / |m| * sum_i w_i |v_i| with m = sum_i w_i v_i / |v_i|, where w are the normalised coefficients.

    mergekit then adds a weighted sum of tangents at m, by the same weights. That sum is zero, so it is left out here.
    Zero vectors have no direction; they and their weights are left out. Where the directions cancel, the weighted mean
    of the vectors is used instead (mergekit refuses this for more than two).

    Returns:
        float32 weights, moved by `scale` from the base.
    Raises:
        RecipeError: A coefficient is negative.
    Source: mergekit's ``multislerp``.
    """
    shares = weights(context)
    if not any(context.active) or not shares:
        return context.base.clone()
    vectors = points(context)
    lengths = [float(norm(v)) for v in vectors]
    alive = [i for i, length in enumerate(lengths) if length > 0]
    total = sum(shares[i] for i in alive)
    if total == 0:
        return context.base.clone()
    w = [shares[i] / total for i in alive]
    mean = torch.stack([w_i * unit(vectors[i]) for w_i, i in zip(w, alive, strict=True)]).sum(0)
    if float(norm(mean)) < _OPPOSED:
        return merged_weights(context, torch.stack([w_i * vectors[i] for w_i, i in zip(w, alive, strict=True)]).sum(0))
    return merged_weights(context, unit(mean) * sum(w_i * lengths[i] for w_i, i in zip(w, alive, strict=True)))

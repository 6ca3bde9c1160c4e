"""Norm matching: scales the combined delta to the mean length of the experts' deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import active

__all__ = ["post"]


def post(context: OperatorContext, combined: Tensor) -> Tensor:
    """D * mean_i ||tau_i|| / ||D||, with the mean over the experts that changed the tensor. A D of zeros stays.

    Args:
        context: The tensor and its deltas.
        combined: The combined delta D, float32.
    Returns:
        float32, shape of `combined`.
    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    """
    alive = active(context)
    length = float(torch.linalg.vector_norm(combined))
    if not alive or length == 0:
        return combined
    mean_length = sum(float(torch.linalg.vector_norm(context.deltas[i])) for i in alive) / len(alive)
    return combined * (mean_length / length)

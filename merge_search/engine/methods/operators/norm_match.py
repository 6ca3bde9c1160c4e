"""Norm matching: the combined delta as long as the experts' deltas are on average."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import active

__all__ = ["post"]


def post(context: OperatorContext, combined: Tensor) -> Tensor:
    """D * mean_i ||tau_i|| / ||D||, the mean over experts that changed the tensor; a D of zeros stays.

    Returns:
        float32, shape of `combined`.
    Raises:
        NonFiniteError: NaN in a delta.
    """
    alive = active(context)
    length = float(torch.linalg.vector_norm(combined))
    if not alive or length == 0:
        return combined
    wanted = sum(float(torch.linalg.vector_norm(context.deltas[i])) for i in alive) / len(alive)
    return combined * (wanted / length)

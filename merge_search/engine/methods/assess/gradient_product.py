"""|gradient of the expert's loss at the base x delta| per parameter: the first-order change of the loss.

Source: APL, arXiv 2408.09485.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.methods.assess import AssessContext

__all__ = ["gradients", "scores"]


def gradients(context: AssessContext, kind: str = "gradient") -> list[Tensor]:
    """Return the gradient of each expert, float32, shape of the tensor.

    Args:
        context: The tensor.
        kind: Name of the statistic.
    Raises:
        RecipeError: The statistic was not measured.
    """
    assert context.group is not None
    name, device = context.group.tensor, context.base.device
    return [statistic_of(context.tensors, kind, e, name).to(device, torch.float32) for e in context.experts]


def scores(context: AssessContext) -> list[Tensor]:
    """Return |delta x gradient| of each expert, float32."""
    return [(t * g).abs() for t, g in zip(context.deltas, gradients(context), strict=True)]

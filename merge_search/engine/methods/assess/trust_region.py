"""Omega = sum over i and j != i of |gradient_i| |delta_j|, one score for all experts: where tasks interfere.

|gradient_i| is the mean over samples of absolute gradients at the base (statistic ``absolute_gradient``). With the
option ``zero_shot``, |delta_i| takes its place and no data are needed. The method drops the parameters with the
*largest* Omega.
Source: Task Arithmetic in the Trust Region, fusion_bench's implementation. Differs: gradients are kept per task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext
from merge_search.engine.methods.assess.gradient_product import gradients

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return Omega for each expert, float32.

    Raises:
        RecipeError: The statistic ``absolute_gradient`` was not measured, and ``zero_shot`` is off.
    """
    sizes = [t.abs() for t in context.deltas]
    slopes = sizes if context.options["zero_shot"] else [g.abs() for g in gradients(context, "absolute_gradient")]
    omega = torch.zeros_like(context.base)
    for i, slope in enumerate(slopes):
        for j, size in enumerate(sizes):
            if i != j:
                omega = omega + slope * size
    return [omega] * len(sizes)

"""Diagonal Fisher information F_i^power + floor, from data.

The option ``at`` selects where it was measured: ``expert`` (Fisher merging), or ``scaled`` for base + coefficient x
delta (DF-Merge), which is the statistic "fisher@<coefficient>". ``normalise`` divides by the norm of F over the tensor.
Sources: Fisher merging, arXiv 2111.09832; DF-Merge, arXiv 2504.18992.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.methods.assess import AssessContext, option

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return F_i^power + floor of each expert, float32, shape of the tensor.

    Raises:
        RecipeError: The statistic was not measured.
    """
    assert context.group is not None
    result = []
    for i, expert in enumerate(context.experts):
        kind = f"fisher@{context.coefficients[i]!r}" if context.options["at"] == "scaled" else "fisher"
        f = statistic_of(context.tensors, kind, expert, context.group.tensor).to(context.base.device, torch.float32)
        power = option(context, "power")
        if power != 1.0:
            f = f**power
        if context.options["normalise"]:
            f = f / torch.linalg.vector_norm(f.to(torch.float64)).clamp(min=1e-30).to(torch.float32)
        floor = option(context, "floor")
        result.append(f + floor if floor else f)
    return result

"""Rank of |delta| within its row, from 0 (smallest) to 1 (largest). Source: DELLA, arXiv 2406.11617."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.kernels.ranks import row_ranks
from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return the ranks of each expert, float32."""
    last = max(1, context.base.shape[-1] - 1) if context.base.ndim else 1
    return [(last - row_ranks(t.abs()).to(torch.float32)) / last for t in context.deltas]

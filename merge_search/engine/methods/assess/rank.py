"""Rank of |delta| within its row, 0 the smallest, 1 the largest. DELLA, arXiv 2406.11617."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.kernels.ranks import row_ranks
from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    last = max(1, context.base.shape[-1] - 1) if context.base.ndim else 1
    return [(last - row_ranks(t.abs()).to(torch.float32)) / last for t in context.deltas]

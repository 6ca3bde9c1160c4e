"""Every parameter scores one."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return ones for each expert, float32."""
    return [torch.ones_like(context.base)] * len(context.deltas)

"""|gradient of the expert's loss at the base x delta|, per parameter: first-order change of the loss. APL, arXiv 2408.09485."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.methods.assess import AssessContext

__all__ = ["gradients", "scores"]


def gradients(context: AssessContext, kind: str = "gradient") -> list[Tensor]:
    """One float32 gradient per expert."""
    assert context.group is not None
    name, device = context.group.tensor, context.base.device
    return [statistic_of(context.tensors, kind, e, name).to(device, torch.float32) for e in context.experts]


def scores(context: AssessContext) -> list[Tensor]:
    return [(t * g).abs() for t, g in zip(context.deltas, gradients(context), strict=True)]

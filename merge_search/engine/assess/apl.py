"""|<gradient of the expert's loss at the base, delta>| per tensor: the causal effect of a partition, to first order.

Signs may cancel inside a partition, as in the paper; `gradient_product` is the rule per parameter.
Source: APL, arXiv 2408.09485. Differs: partitions are tensors; no code was released.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.assess import AssessContext
from merge_search.engine.assess.gradient_product import gradients

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    pairs = zip(context.deltas, gradients(context), strict=True)
    return [(t.to(torch.float64) * g.to(torch.float64)).sum().abs().to(torch.float32) for t, g in pairs]

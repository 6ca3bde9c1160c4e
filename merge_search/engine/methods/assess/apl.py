"""|<gradient of the expert's loss at the base, delta>| per tensor: the causal effect of a partition, to first order.

Signs may cancel inside a partition, as in the paper; `gradient_product` is the rule per parameter. With ``normalise`` the
product is divided by both norms: how far the delta points along the gradient, in [0, 1]. The plain product grows with the
number of elements, so that the largest matrices of every expert would take all of a coefficient that is shared out by it.
Source: APL, arXiv 2408.09485. Differs: partitions are tensors; no code was released, so `normalise` is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext
from merge_search.engine.methods.assess.gradient_product import gradients

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """One number per expert, float32; products and norms in float64. 0 where delta or gradient is zero."""
    found = []
    for delta, gradient in zip(context.deltas, gradients(context), strict=True):
        t, g = delta.to(torch.float64), gradient.to(torch.float64)
        product = (t * g).sum().abs()
        if context.options["normalise"]:
            product = product / (t.norm() * g.norm()).clamp_min(torch.finfo(torch.float64).tiny)
        found.append(product.to(torch.float32))
    return found

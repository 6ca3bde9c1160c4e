"""|<gradient of the expert's loss at the base, delta>| per tensor: the causal effect of a partition, to first order.

Signs may cancel within a partition, as in the paper; `gradient_product` is the rule per parameter. With ``normalise``
the product is divided by both norms. It then measures how far the delta points along the gradient, in [0, 1]. The plain
product grows with the number of elements, so the largest matrices of every expert would take all of a coefficient that
is shared out in proportion to it.
Source: APL, arXiv 2408.09485. Differs: partitions are tensors. No code was released, and `normalise` is an addition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext
from merge_search.engine.methods.assess.gradient_product import gradients

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return one number per expert, float32; 0 where delta or gradient is zero. Products and norms are float64.

    Raises:
        RecipeError: The statistic ``gradient`` was not measured.
    """
    products = []
    for delta, gradient in zip(context.deltas, gradients(context), strict=True):
        t, g = delta.to(torch.float64), gradient.to(torch.float64)
        product = (t * g).sum().abs()
        if context.options["normalise"]:
            product = product / (t.norm() * g.norm()).clamp_min(torch.finfo(torch.float64).tiny)
        products.append(product.to(torch.float32))
    return products

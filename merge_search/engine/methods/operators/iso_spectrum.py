"""Iso-spectrum: flattens the spectrum of the combined delta of any merge."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import is_matrix, oriented, spectrum_factors, svd, working

__all__ = ["post"]


def post(context: OperatorContext, combined: Tensor) -> Tensor:
    """S <- c S**power, with c such that the sum of singular values stays: power 0 is isotropic, 1 changes nothing.

    Options: ``power``. ``tolerance``: S up to this share of the largest count as noise and become 0.

    Args:
        context: The tensor and the options.
        combined: The combined delta, float32.
    Returns:
        float32, shape of `combined`. Vectors stay as they are.
    Cost: one SVD per matrix and candidate.
    Source: Iso-C, arXiv 2502.04959, as a rule for any merge. Differs: powers between 0 and 1.
    """
    power = context.number("power")
    if power == 1.0 or not is_matrix(context):
        return combined
    u, s, vh = svd(working(oriented(context, combined)))
    s = s * spectrum_factors(s, power=power, tolerance=context.number("tolerance"))
    return oriented(context, (u * s[..., None, :]) @ vh).to(torch.float32).contiguous()

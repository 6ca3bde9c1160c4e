"""Iso-C: the summed delta with all its singular values made equal."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import (
    active,
    is_matrix,
    mean_parts,
    oriented,
    spectrum_factors,
    svd,
    working,
    zero_parts,
)
from merge_search.engine.methods.operators.remember import remembered

__all__ = ["parts"]


@remembered("iso_c")
def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = P tau_i with P = U diag(f) U^T and f = mean(S) / S, where sum_i tau_i = U diag(S) V^T.

    The parts sum to mean(S) U V^T. Where the deltas nearly cancel (small S), single parts can be much longer than their
    sum; consider this when coefficients are fitted. Tensors that are no matrices are averaged.

    Options: ``power`` a: singular values become S**a with the same sum (0 as published; 1 gives the deltas back: task
    arithmetic). ``tolerance``: S up to this share of the largest count as noise and become 0. ``embeddings``: treat
    embedding and head as well.
    Differs: the tolerance (the released code raises noise to the mean as well).

    Returns:
        float32, one tensor per expert.
    Raises:
        NonFiniteError: A delta holds NaN or infinity.
    Cost: one SVD per matrix; none per candidate when cached.
    Source: Marczak et al. 2025, arXiv 2502.04959.
    """
    if not is_matrix(context):
        return mean_parts(context)
    result, alive = zero_parts(context), active(context)
    power = context.number("power")
    if not alive or power == 1.0:
        return [delta.clone() for delta in context.deltas]
    total = torch.stack([context.deltas[i] for i in alive]).sum(0)
    u, s, _ = svd(working(oriented(context, total)))
    f = spectrum_factors(s, power=power, tolerance=context.number("tolerance"))
    for i in alive:
        tau = oriented(context, context.deltas[i]).to(u.dtype)
        result[i] = oriented(context, u @ (f[..., :, None] * (u.mT @ tau))).to(torch.float32).contiguous()
    return result

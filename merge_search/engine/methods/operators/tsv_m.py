"""TSV-Merge: low-rank deltas whose singular directions are made orthogonal between experts."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import (
    active,
    is_matrix,
    mean_parts,
    oriented,
    polar,
    svd,
    working,
    zero_parts,
)
from merge_search.engine.methods.operators.remember import remembered
from merge_search.errors import RecipeError

__all__ = ["parts"]

_NOISE = 1e-5
"""Singular values up to this share of the largest have directions of rounding noise: left out."""


@remembered("tsv_m")
def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = U_perp[:, idx_i] diag(S_i) V_perp[:, idx_i]^T: the share of expert i's singular triples; they sum to TSV-M's delta.

    Each delta is cut to its k = rank_share * min(out, in) / M leading singular triples (at least one), U_perp and V_perp are
    the polar factors of all U_i, V_i side by side, idx_i are expert i's columns. M counts experts that changed the tensor: one
    alone keeps its whole delta. Options: ``rank_share``, 1 as published (0.2 to 1.5 are worth a try); ``embeddings``: treat
    embedding and head too. Other tensors are averaged. alpha of the paper is the recipe's scale.
    Differs: directions without singular value, or shared by experts to the last digit, are left out instead of filled up.

    Returns:
        float32, one per expert.
    Raises:
        RecipeError: rank_share is not positive. NonFiniteError: NaN in a delta.
    Cost: M + 2 SVDs per matrix; none per candidate when cached.
    Source: Gargiulo et al. 2024, arXiv 2412.00081.
    """
    share = context.number("rank_share")
    if share <= 0:
        raise RecipeError(f"tsv_m: rank_share must be > 0, got {share:g}")
    if not is_matrix(context):
        return mean_parts(context)
    result, alive = zero_parts(context), active(context)
    if not alive:
        return result
    n = min(context.base.shape[-2:])
    rank = min(n, max(1, int(share * n / len(alive) + 1e-9)))
    lefts, values, rights = [], [], []
    for i in alive:
        u, s, vh = svd(working(oriented(context, context.deltas[i])))
        kept = (s[..., :rank] > _NOISE * s[..., :1]).to(s.dtype)
        lefts.append(u[..., :rank] * kept[..., None, :])
        values.append(s[..., :rank] * kept)
        rights.append(vh[..., :rank, :].mT * kept[..., None, :])
    left, right = polar(torch.cat(lefts, -1)), polar(torch.cat(rights, -1))
    for place, i in enumerate(alive):
        own = slice(place * rank, (place + 1) * rank)
        part = (left[..., own] * values[place][..., None, :]) @ right[..., own].mT
        result[i] = oriented(context, part).to(torch.float32).contiguous()
    return result

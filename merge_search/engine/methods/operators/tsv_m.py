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
"""Singular values up to this share of the largest have directions of rounding noise, which are left out."""


@remembered("tsv_m")
def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = U_perp[:, idx_i] diag(S_i) V_perp[:, idx_i]^T: expert i's share of TSV-M's delta.

    Each delta is cut to its k = rank_share * min(out, in) / M leading singular triples (at least one). U_perp and
    V_perp are the polar factors of all U_i, V_i side by side. idx_i are expert i's columns. The parts sum to TSV-M's
    delta. M counts the experts that changed the tensor; a single one keeps its whole delta. Tensors that are no
    matrices are averaged. The paper's alpha is the recipe's scale.

    Options: ``rank_share``, 1 as published (0.2 to 1.5 are worth trying). ``embeddings``: treat embedding and head as
    well.
    Differs: directions without a singular value, or shared by experts to the last digit, are left out instead of filled
    up.

    Returns:
        float32, one tensor per expert.
    Raises:
        RecipeError: ``rank_share`` is not positive.
        NonFiniteError: A delta holds NaN or infinity.
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
    for position, i in enumerate(alive):
        columns = slice(position * rank, (position + 1) * rank)
        part = (left[..., columns] * values[position][..., None, :]) @ right[..., columns].mT
        result[i] = oriented(context, part).to(torch.float32).contiguous()
    return result

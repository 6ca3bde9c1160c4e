"""Iso-CTS: a flat spectrum over the directions that experts share and the directions that each has for itself."""

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

__all__ = ["parts", "split_ranks"]


@remembered("iso_cts")
def parts(context: OperatorContext) -> list[Tensor]:
    """Parts of mean(S) U_perp V_perp^T: frames of common and task-specific directions side by side, made orthogonal.

    The common directions are the leading singular triples of sum_i tau_i = U diag(S) V^T. The task-specific directions
    are the leading triples of the rest of each delta, tau_i - U_c U_c^T tau_i. mean(S) is over all of them. Expert i
    gets its own directions whole, and of each common direction r the share u_r^T tau_i v_r / S_r that it contributed.
    These shares sum to one. They are a choice of this implementation, as the paper has no parts. M counts the experts
    that changed the tensor. Tensors that are no matrices are averaged.

    Options: ``common``: fraction of directions that are common. ``tolerance``: singular values up to this share of the
    largest count as noise and are left out of frames and mean. ``embeddings``: treat embedding and head as well.
    Differs: the tolerance.

    Returns:
        float32, one tensor per expert.
    Raises:
        RecipeError: ``common`` is outside [0, 1].
        NonFiniteError: A delta holds NaN or infinity.
    Cost: M + 3 SVDs per matrix; none per candidate when cached.
    Source: Marczak et al. 2025, arXiv 2502.04959.
    """
    if not 0 <= context.number("common") <= 1:
        raise RecipeError(f"iso_cts: common must be in [0, 1], got {context.number('common'):g}")
    if not is_matrix(context):
        return mean_parts(context)
    result, alive = zero_parts(context), active(context)
    if not alive:
        return result
    taus = [working(oriented(context, context.deltas[i])) for i in alive]
    n_common, n_own = split_ranks(min(context.base.shape[-2:]), len(taus), context.number("common"))
    frames = _frames(taus, n_common, n_own, context.number("tolerance"))
    left = polar(torch.cat([u for u, _, _ in frames], -1))
    right = polar(torch.cat([v for _, _, v in frames], -1))
    values = torch.cat([s for _, s, _ in frames], -1)
    kept = values > 0
    level = values.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)
    u, s, v = (frames[0][0], frames[0][1], frames[0][2])
    for position, i in enumerate(alive):
        given = torch.zeros_like(values)
        share = (u * (taus[position] @ v)).sum(-2) / torch.where(s > 0, s, 1.0)
        given[..., :n_common] = torch.where(s > 0, share, 0.0)
        specific = slice(n_common + position * n_own, n_common + (position + 1) * n_own)
        given[..., specific] = kept[..., specific].to(values.dtype)
        part = (left * (level * given)[..., None, :]) @ right.mT
        result[i] = oriented(context, part).to(torch.float32).contiguous()
    return result


def split_ranks(n: int, n_experts: int, common: float) -> tuple[int, int]:
    """Return the number of common directions and the number of each expert's own directions.

    Together they are `n`, as near to the share `common` as divides evenly.
    """
    n_own = min(round((n - int(n * common)) / n_experts), n // n_experts)
    return n - n_own * n_experts, n_own


def _frames(taus: list[Tensor], n_common: int, n_own: int, tolerance: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (U, S, V) of the common directions, then of each expert's own. Directions of noise are zero."""
    frames = [_leading(torch.stack(taus).sum(0), n_common, tolerance, None)]
    common = frames[0][0]
    for tau in taus:
        rest = tau - common @ (common.mT @ tau)
        frames.append(_leading(rest, n_own, tolerance, torch.linalg.matrix_norm(tau)))
    return frames


def _leading(x: Tensor, k: int, tolerance: float, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading `k` singular triples. Those with singular values up to the limit are zero.

    The limit is `tolerance` times `size`, or times the largest singular value if `size` is None.
    """
    u, s, vh = svd(x)
    limit = tolerance * (s[..., :1] if size is None else size[..., None])
    kept = ((s > limit) & (s > 0)).to(s.dtype)[..., :k]
    return u[..., :k] * kept[..., None, :], s[..., :k] * kept, vh[..., :k, :].mT * kept[..., None, :]

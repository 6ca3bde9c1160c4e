"""CoPA-Merging / RobustMerge: LoRA pairs of several experts, merged as pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import Factors
from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import active, mean_parts, pair_by_svd, zero_parts
from merge_search.errors import RecipeError

__all__ = ["pairs", "parts"]


def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = strength * (M_i^B B_i) S~_i sum_k (M_k^A A_k): expert i's share of CoPA's delta.

        M^A, M^B  keep the density's share of |A| and |B|, each matrix by itself (`rescale` makes up for A's loss)
        S_i       diagonal: s_ij = sum |A_i[j]| / sum |(M_i^A A_i)[j]| for rank j, at least 1
        S~_i      S_i / sum_k S_k: balanced between the experts, rank by rank

    The sum of the parts is a product of sums, with terms B_i A_k of different experts. Coefficients weigh the B_i. The
    adapter's scale alpha / r is in B. M and the sums count experts that changed the tensor. Ranks that an adapter lacks
    are zeros with scale 1, and so are ranks that pruning emptied. A tensor that one of them changed without a pair
    (saved whole, or a vector) is averaged, as the released code does with its other weights.

    Options: ``strength``, the paper's lambda. ``prune``: ``both`` factors, ``a`` or ``b`` alone. ``rescale``: S_i; off,
    it is 1. ``clip``: each S_i is raised to its own order statistic int(clip * r), 0 for the paper's form, 0.8 as
    released. ``normalise``: S~; off, it is S. ``cross``: off, part i has its own A_i in place of the sum, so that
    coefficients weigh whole experts (ours). ``gauge`` (ours): a product has many pairs, and pruning depends on which;
    ``stored``, ``balanced`` (factors of equal norm) or ``svd`` (both factors times the root of the singular values in
    descending order, so that rank j means the same in all experts; the largest entry of each left vector is positive).
    Differs: the release's threshold keeps one entry more, and its strength is 4, since it doubles both factors.

    Returns:
        float32, one tensor per expert.
    Raises:
        RecipeError: ``clip`` is not in [0, 1).
        NonFiniteError: A delta holds NaN or infinity.
    Cost: one sort of the factors and one product per expert.
    Source: Zeng et al. 2025, arXiv 2502.17159, in the form of the released code. That the paper's form is this one
    without `clip` is from notes on it (UNVERIFIED).
    """
    found = pairs(context)
    if found is None:
        return mean_parts(context)
    return [zero if f is None else f.delta() for f, zero in zip(found, zero_parts(context), strict=True)]


def pairs(context: OperatorContext) -> list[Factors | None] | None:
    """`parts` as pairs, None for an expert without part; None alone where the tensor is averaged.

    Where parts share their A, it is the same tensor.
    """
    clip = context.number("clip")
    if not 0 <= clip < 1:
        raise RecipeError(f"copa: clip must be in [0, 1), got {clip:g}")
    alive = active(context)
    given = [context.factors(context.experts[i]) if context.factors else None for i in alive]
    found = [_in_gauge(f, str(context.options["gauge"])) for f in given if f is not None]
    if not found or len(found) < len(alive):
        return None
    densities = [context.densities[i] if context.densities else 1.0 for i in alive]
    rank, prune = max(f.rank for f in found), context.options["prune"]
    a = [f.a if prune == "b" else _pruned(f.a, d) for f, d in zip(found, densities, strict=True)]
    b = [f.b if prune == "a" else _pruned(f.b, d) for f, d in zip(found, densities, strict=True)]
    scales = torch.ones(len(alive), rank, device=context.base.device)
    if context.options["rescale"]:
        for row, f, kept in zip(scales, found, a, strict=True):
            row[: f.rank] = _clipped(_loss(f.a, kept), clip)
    if context.options["normalise"]:
        scales = scales / scales.sum(0)
    total = torch.zeros(rank, a[0].shape[1], device=context.base.device)
    for factor in a:
        total[: len(factor)] += factor
    result: list[Factors | None] = [None] * len(context.experts)
    for position, i in enumerate(alive):
        r, transpose = found[position].rank, found[position].transpose
        own = context.number("strength") * b[position] * scales[position, :r]
        if not context.options["cross"]:
            result[i] = Factors(own, a[position], transpose)
        else:
            padded = torch.nn.functional.pad(own, (0, rank - r))
            result[i] = Factors(padded, total, transpose)
    return result


def _pruned(factor: Tensor, density: float) -> Tensor:
    """The density's share of the entries of largest magnitude, at least one; ties by lowest index."""
    flat = factor.reshape(-1)
    kept = max(1, round(density * flat.numel()))
    order = torch.sort(flat.abs(), descending=True, stable=True).indices
    out = flat.clone()
    out[order[kept:]] = 0.0
    return out.reshape(factor.shape)


def _loss(a: Tensor, kept: Tensor) -> Tensor:
    """sum |A| / sum |kept A| of every row, 1 where nothing was kept."""
    left = kept.abs().sum(1)
    return torch.where(left > 0, a.abs().sum(1) / left, 1.0)


def _clipped(scales: Tensor, share: float) -> Tensor:
    """Scales, raised to the order statistic number int(share * n), counted from 0."""
    return torch.clamp(scales, min=scales.sort().values[int(share * len(scales))])


def _in_gauge(f: Factors, gauge: str) -> Factors:
    """A pair of the same product."""
    if gauge == "balanced":
        ratio = torch.sqrt(torch.linalg.norm(f.a) / torch.linalg.norm(f.b))
        return Factors(f.b * ratio, f.a / ratio, f.transpose)
    if gauge == "svd":
        return pair_by_svd(f)
    return f

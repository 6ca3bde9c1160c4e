"""Model Stock: how far to go from the base to the average, from the angle between the deltas."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import oriented
from merge_search.errors import RecipeError

__all__ = ["parts", "ratio"]


def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = t tau_i / M with t = M cos / (1 + (M - 1) cos), where cos is the mean cosine over pairs of deltas.

    M counts the experts that changed the tensor. With one such expert t = 1. To vary the factor t, use the recipe's
    scale.

    Options: ``scope``: with ``layer``, M counts the experts that changed any tensor of the block, and the block's
    deltas are taken as one long vector; with ``row``, cos and M are those of each row of the matrix. ``clamp``: clamp
    cos to [0, 1] first. Without it, opposed deltas lead away from the average, and t is undefined at cos = -1 / (M -
    1), where it is set to 0. ``count="all"``: M counts all experts, and a zero delta has cosine 0 to the others
    (mergekit).
    Differs: the paper leaves cos unclamped and works per tensor.

    Returns:
        float32, one tensor per expert.
    Raises:
        RecipeError: The scope is ``layer`` and the block's other tensors are not given.
    Source: Jang et al. 2024, arXiv 2403.19522.
    """
    if context.options["scope"] == "row" and context.base.ndim > 1:
        return _by_row(context)
    everyone = context.options["count"] == "all"
    t, n = ratio(_pooled(context), clamp=bool(context.options["clamp"]), everyone=everyone)
    return [delta * (t / max(n, 1)) for delta in context.deltas]


def ratio(gram: Tensor, *, clamp: bool, everyone: bool = False) -> tuple[float, int]:
    """Return t, and the number of experts that count: those with a delta, or all.

    Args:
        gram: Inner products of the deltas. Shape (M, M), float64.
        clamp: Clamp the mean cosine to [0, 1].
        everyone: Count all experts.
    """
    alive = torch.nonzero(gram.diagonal() > 0).reshape(-1)
    n = len(gram) if everyone else len(alive)
    if n < 2:
        return 1.0, n
    length = gram.diagonal()[alive].sqrt()
    cosines = gram[alive][:, alive] / (length[:, None] * length)
    cos = float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    if clamp:
        cos = min(max(cos, 0.0), 1.0)
    bottom = 1 + (n - 1) * cos
    return (n * cos / bottom if abs(bottom) > 1e-9 else 0.0), n


def _by_row(context: OperatorContext) -> list[Tensor]:
    """As `parts`, with `ratio` computed for every row."""
    deltas = torch.stack([oriented(context, delta) for delta in context.deltas]).to(torch.float64)
    length = torch.linalg.vector_norm(deltas, dim=-1, keepdim=True)
    alive = (length > 0).sum(0)
    n = torch.full_like(alive, len(deltas)) if context.options["count"] == "all" else alive
    units = deltas / length.clamp_min(torch.finfo(torch.float64).tiny)
    cos = (units.sum(0).square().sum(-1, keepdim=True) - alive) / (n * (n - 1)).clamp_min(1)
    if context.options["clamp"]:
        cos = cos.clamp(0.0, 1.0)
    bottom = 1 + (n - 1) * cos
    t = torch.where(n < 2, 1.0, torch.where(bottom.abs() > 1e-9, n * cos / bottom, 0.0))
    factor = (t / n.clamp_min(1)).to(torch.float32)
    return [oriented(context, oriented(context, delta) * factor) for delta in context.deltas]


def _pooled(context: OperatorContext) -> Tensor:
    """Return the inner products of the deltas over the scope, computed once per tensor or block."""
    by_layer = context.options["scope"] == "layer" and context.group.block is not None
    key = ("model_stock", context.group.block if by_layer else context.name, context.experts)
    if key not in context.memory:
        if by_layer and context.siblings is None:
            raise RecipeError(
                f"model_stock: scope 'layer' needs the other tensors of the block of {context.where()}; "
                "use scope 'tensor'"
            )
        groups = context.siblings() if by_layer and context.siblings is not None else [context.deltas]
        context.memory[key] = torch.stack([_gram(deltas) for deltas in groups]).sum(0)
    gram: Tensor = context.memory[key]
    return gram


def _gram(deltas: tuple[Tensor, ...]) -> Tensor:
    gram = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for i, a in enumerate(deltas):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = float((a * deltas[j]).sum(dtype=torch.float64))
    return gram

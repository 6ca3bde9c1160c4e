"""RegMean: the matrix whose outputs match those of all experts' linear layers best."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import is_matrix, mean_parts, oriented, right_divide
from merge_search.engine.methods.operators.remember import remembered
from merge_search.errors import NotMeasuredError, RecipeError

__all__ = ["parts"]


@remembered("regmean")
def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = tau_i G_i (sum_j G_j)^-1, so that theta = (sum_i W_i G_i)(sum_i G_i)^-1; W is (out, in).

    G_i is the statistic ``gram`` of expert i: X_i^T X_i / n of the layer's inputs, shape (in, in), or (stack, in, in)
    for fused experts. An expert that did not change the matrix still pulls towards the base by its Gram matrix. Tensors
    without Gram matrices (vectors, embeddings) are averaged.

    Options: ``alpha`` multiplies the off-diagonal of G_i (released: 0.95 for CLIP, 0.6 for GPT-2, 0.1 elsewhere).
    ``ridge`` times the mean diagonal is added to every diagonal, which pulls inputs that were never seen to the
    average.
    Differs: solved in float64, the ridge.

    Returns:
        float32, one tensor per expert.
    Raises:
        RecipeError: An attention or MLP matrix has no Gram matrices, those of some experts are missing, or their sizes
            are wrong.
    Cost: one Cholesky factor of (in, in) and M solves in float64.
    Source: Jin et al. 2022, arXiv 2212.09849.
    """
    grams = _grams(context) if is_matrix(context) else None
    if grams is None:
        return mean_parts(context)
    mean_diagonal = torch.stack([g.diagonal(dim1=-2, dim2=-1).mean(-1) for g in grams]).mean(0)
    added = torch.where(mean_diagonal > 0, context.number("ridge") * mean_diagonal, 1.0)
    for g in grams:
        diagonal = g.diagonal(dim1=-2, dim2=-1).clone()
        g.mul_(context.number("alpha"))
        g.diagonal(dim1=-2, dim2=-1).copy_(diagonal + added[..., None])
    total = torch.stack(grams).sum(0)
    result = []
    for delta, g in zip(context.deltas, grams, strict=True):
        part = right_divide(oriented(context, delta).to(torch.float64) @ g, total)
        result.append(oriented(context, part).to(torch.float32).contiguous())
    return result


def _measured(context: OperatorContext, expert: str) -> Tensor | None:
    if context.statistic is None:
        return None
    try:
        return context.statistic("gram", expert)
    except NotMeasuredError:  # not measured; `_grams` refuses this for linear layers only
        return None


def _grams(context: OperatorContext) -> list[Tensor] | None:
    """Return float64 copies of the Gram matrices; None where the tensor is no linear layer.

    Raises:
        RecipeError: Gram matrices of a linear layer are missing, or their sizes are wrong.
    """
    grams = {expert: _measured(context, expert) for expert in context.experts}
    missing = [expert for expert, gram in grams.items() if gram is None]
    is_linear = context.base.ndim == 2 and context.group.kind in ("attention", "mlp")
    if missing and (is_linear or len(missing) < len(grams)):
        raise RecipeError(
            f"regmean needs the statistic 'gram' of every expert for {context.where()}, "
            f"it was not measured for {', '.join(missing)}; add a statistics provider for it to the study"
        )
    if missing:
        return None
    n_in = oriented(context, context.base).shape[-1]
    wanted = (*context.base.shape[:-2], n_in, n_in)
    for expert, gram in grams.items():
        assert gram is not None
        if gram.shape != wanted:
            raise RecipeError(
                f"regmean: the Gram matrix of {context.where()} must have shape {wanted}, "
                f"expert {expert!r} has {tuple(gram.shape)}; measure it again"
            )
    return [g.to(device=context.base.device, dtype=torch.float64, copy=True) for g in grams.values() if g is not None]

"""WUDI-Merging: the merged delta that interferes least with what every expert's delta does to its own inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import (
    active,
    is_matrix,
    mean_parts,
    oriented,
    right_divide,
    working,
    zero_parts,
)
from merge_search.engine.methods.operators.remember import remembered
from merge_search.errors import RecipeError

__all__ = ["parts"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@remembered("wudi")
def parts(context: OperatorContext) -> list[Tensor]:
    """Parts of the minimiser of sum_i || (D - tau_i) tau_i^T ||_F^2 / || tau_i ||_F^2.

    The rows of tau_i take the place of inputs. With A_i = tau_i^T tau_i / ||tau_i||^2 and A = sum_i A_i:

    solver ``adam``    ``steps`` steps of Adam from sum_i tau_i, as released; few, small steps act as its regulariser.
                       processed_i = tau_i + (change by Adam) / M. With ``relative_lr``, ``lr`` is a multiple of the
                       RMS of the sum. As published, ``lr`` is absolute and so depends on the size of the deltas.
    solver ``closed``  the stationary point, pulled to sum_i tau_i by ``ridge`` times the mean diagonal of A:
                       processed_i = tau_i + tau_i (A_i - A)(A + ridge m I)^-1. Ridge 0: the optimum nearest to the sum.

    ``norm="plain"`` divides by ||tau_i||, as the authors' vision code does. ``embeddings``: treat embedding and head as
    well. M counts the experts that changed the tensor. Tensors that are no matrices are averaged.
    Differs: the gradient 2 (D A - sum_i tau_i A_i) is written out, with one product a step whatever M is.

    Returns:
        float32, one tensor per expert; they sum to D.
    Raises:
        RecipeError: ``ridge``, ``steps`` or ``lr`` is negative.
        NonFiniteError: A delta holds NaN or infinity.
    Cost: M products for A, then ``steps`` products, or one Cholesky factor and M solves of (in, in) in float64.
    Source: Cheng et al. 2025, arXiv 2503.08099.
    """
    for name in ("ridge", "steps", "lr"):
        if context.number(name) < 0:
            raise RecipeError(f"wudi: {name} must be >= 0, got {context.number(name):g}")
    if not is_matrix(context):
        return mean_parts(context)
    result, alive = zero_parts(context), active(context)
    if not alive:
        return result
    taus = [working(oriented(context, context.deltas[i])) for i in alive]
    processed = _closed(context, taus) if context.options["solver"] == "closed" else _adam(context, taus)
    for i, part in zip(alive, processed, strict=True):
        result[i] = oriented(context, part).to(torch.float32).contiguous()
    return result


def _grams(context: OperatorContext, taus: list[Tensor]) -> list[Tensor]:
    grams = []
    for tau in taus:
        size = torch.linalg.matrix_norm(tau)
        size = size if context.options["norm"] == "plain" else size**2
        grams.append(tau.mT @ tau / torch.where(size > 0, size, 1.0)[..., None, None])
    return grams


def _closed(context: OperatorContext, taus: list[Tensor]) -> list[Tensor]:
    taus = [tau.to(torch.float64) for tau in taus]
    grams = _grams(context, taus)
    total = torch.stack(grams).sum(0)
    bottom = total.clone()
    diagonal = bottom.diagonal(dim1=-2, dim2=-1)
    diagonal += context.number("ridge") * diagonal.mean(-1, keepdim=True)
    return [tau + right_divide(tau @ (gram - total), bottom) for tau, gram in zip(taus, grams, strict=True)]


def _adam(context: OperatorContext, taus: list[Tensor]) -> list[Tensor]:
    grams = _grams(context, taus)
    total = torch.stack(grams).sum(0)
    target = torch.stack([tau @ gram for tau, gram in zip(taus, grams, strict=True)]).sum(0)
    start = torch.stack(taus).sum(0)
    lr = context.number("lr")
    if context.options["relative_lr"]:
        lr *= float(start.square().mean().sqrt())
    d, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, int(context.number("steps")) + 1):
        gradient = 2 * (d @ total - target)
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        bottom = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        d.addcdiv_(first, bottom, value=-lr / (1 - _BETAS[0] ** step))
    added = (d - start) / len(taus)
    return [tau + added for tau in taus]

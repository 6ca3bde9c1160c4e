"""Parameter competition balancing as published: softmax(M norm(tau_i^2)) x sum_j softmax(norm(tau_i tau_j)).

norm is the L2 normalisation. Both softmaxes run over all parameters of the tensor.
Source: PCB-Merging, arXiv 2410.02396, equations as restated in a re-implementation. Differs: the paper's scope is the
whole model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]

_CHUNK = 2**18  # elements that are summed in float64 at a time


def scores(context: AssessContext) -> list[Tensor]:
    """Return the scores of each expert, float32.

    Cost: one softmax per pair. Memory beside the results: two tensors, which are reused.
    """
    deltas = [t.reshape(-1) for t in context.deltas]
    product, shares = torch.empty_like(deltas[0]), torch.empty_like(deltas[0])
    inter = [torch.zeros_like(t) for t in deltas]
    for i, delta in enumerate(deltas):
        for j in range(i, len(deltas)):  # so that every sum runs over the experts in their order
            _unit(torch.mul(delta, deltas[j], out=product))
            torch.softmax(product, 0, out=shares)
            for k in {i, j}:
                inter[k] += shares
    for delta, result in zip(deltas, inter, strict=True):
        torch.softmax(_unit(torch.mul(delta, delta, out=product)).mul_(context.n_experts), 0, out=shares)
        result.mul_(shares).mul_(delta.numel() ** 2)  # a constant that keeps 1 / numel**2 out of the denormals
    return [t.reshape(context.base.shape) for t in inter]


def _unit(x: Tensor) -> Tensor:
    """Divide `x` by its length, in place."""
    parts = [part.to(torch.float64).square_().sum() for part in torch.split(x, _CHUNK)]
    return x.div_(torch.stack(parts).sum().sqrt().clamp(min=1e-30).to(torch.float32))

"""Parameter competition balancing as published: softmax(M norm(tau_i^2)) x sum_j softmax(norm(tau_i tau_j)).

norm is the L2 normalisation and both softmaxes run over all parameters of the tensor.
Source: PCB-Merging, arXiv 2410.02396, equations as restated in a re-implementation; the paper's scope is the whole model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    deltas = list(context.deltas)
    result = []
    for mine in deltas:
        intra = _softmax(context.n_experts * _unit(mine * mine))
        inter = _softmax(_unit(mine * deltas[0]))
        for other in deltas[1:]:
            inter = inter + _softmax(_unit(mine * other))
        result.append(intra * inter * mine.numel() ** 2)  # a constant that keeps 1 / numel**2 out of the denormals
    return result


def _unit(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x.to(torch.float64))
    return x / length.clamp(min=1e-30).to(torch.float32)


def _softmax(x: Tensor) -> Tensor:
    shares: Tensor = torch.softmax(x.reshape(-1), 0)
    return shares.reshape(x.shape)

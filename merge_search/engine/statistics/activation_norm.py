"""Size of what every weight is multiplied with: the L2 norm of its input feature over all tokens / sqrt(number of tokens).

The division makes experts comparable whose rows differ in length; within an expert it changes no ranking. A row of an
embedding is met by the tokens that look it up: sqrt(share of tokens), zero for tokens that never come. What is no matrix
(gains of normalised inputs, biases) is met by a feature of size one. Source: Wanda, arXiv 2306.11695.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.statistics.forward import Role, mean_over_inputs
from merge_search.engine.statistics.rows import Work

__all__ = ["measure"]


def _squares(role: Role, inputs: Tensor, weight: Tensor) -> Tensor:
    if role == "embedding":
        return torch.bincount(inputs, minlength=weight.shape[0]).to(torch.float64)
    return inputs.to(torch.float32).square().sum(0, dtype=torch.float64)


def measure(work: Work) -> dict[str, Tensor]:
    """Shape (1, in) for weights (out, in), (in, 1) for (in, out), (rows, 1) for embeddings, ones for the rest.

    A matrix that is embedding and head at once is a head.
    """
    found = mean_over_inputs(work, _squares)
    result = {name: torch.ones([1] * view.ndim) for name, view in work.views.items()}
    for role in ("embedding", "conv1d", "linear"):
        for (name, used), squares in found.items():
            if used == role:
                result[name] = squares.sqrt().to(torch.float32)[:, None]
                if role == "linear":
                    result[name] = result[name].mT.contiguous()
    return result

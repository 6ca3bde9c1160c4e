"""Size of the inputs of every weight: the L2 norm of its input feature over all tokens / sqrt(number of tokens).

The division makes experts comparable whose rows differ in length. Within an expert it changes no ranking. The input of
an embedding's row is the tokens that look it up: sqrt(share of tokens), zero for tokens that never occur. Tensors that
are no matrices (gains of normalised inputs, biases) count as having an input of size one. Source: Wanda, arXiv
2306.11695.
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
    """Return by tensor name a float32 tensor that broadcasts to the weights.

    Shapes: (1, in) for weights (out, in), (in, 1) for (in, out), (rows, 1) for embeddings, ones for all other tensors.
    A matrix that is both embedding and head counts as a head.
    """
    means = mean_over_inputs(work, _squares)
    result = {name: torch.ones([1] * view.ndim) for name, view in work.views.items()}
    for role in ("embedding", "conv1d", "linear"):
        for (name, used), squares in means.items():
            if used == role:
                result[name] = squares.sqrt().to(torch.float32)[:, None]
                if role == "linear":
                    result[name] = result[name].mT.contiguous()
    return result

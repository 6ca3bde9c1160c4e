"""Gram matrices X^T X / n of the inputs of every matrix, for RegMean. Source: Jin et al. 2022, arXiv 2212.09849.

Embeddings have none, even where a head shares their matrix: RegMean averages them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.statistics.forward import Role, mean_over_inputs
from merge_search.engine.statistics.rows import Work

__all__ = ["measure"]


def _products(role: Role, inputs: Tensor, _: Tensor) -> Tensor | None:
    if role == "embedding":
        return torch.zeros((), device=inputs.device)  # marks the matrix as an embedding
    x = inputs.to(torch.float32)
    return (x.mT @ x).to(torch.float64)


def measure(work: Work) -> dict[str, Tensor]:
    """Return the Gram matrices by tensor name: float32, shape (in, in).

    Cost: products in float32 and their sums in float64, so 8 in^2 bytes per matrix while it runs.
    """
    means = mean_over_inputs(work, _products)
    return {
        name: gram.to(torch.float32)
        for (name, role), gram in means.items()
        if role != "embedding" and (name, "embedding") not in means
    }

"""Gram matrices X^T X / n of the inputs of every matrix on few prompts. No right answer is read.

The inputs of an embedding are tokens, whose Gram matrix is diagonal. A matrix that is both embedding and head has that
of the embedding: for `regmean_parts` it is as good as the sum of both (0.664 and 0.661 of the validation rows of three
language models are right).
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.statistics.forward import Role, mean_over_inputs
from merge_search.engine.statistics.rows import Work

__all__ = ["measure"]


def _products(role: Role, inputs: Tensor, matrix: Tensor) -> Tensor:
    if role == "embedding":
        return torch.bincount(inputs, minlength=matrix.shape[0]).to(torch.float64)[:, None]
    x = inputs.to(torch.float32)
    return (x.mT @ x).to(torch.float64)


def measure(work: Work, prompts: int) -> dict[str, Tensor]:
    """Return by tensor name, float32: Gram matrices of shape (in, in); for embeddings the share of tokens that look up
    each row, shape (rows, 1).

    Args:
        work: The live model, and the prompts.
        prompts: Most prompts of each task. The rows of `work` were chosen by it.
    Cost: products in float32 and their sums in float64, so 8 in^2 bytes per matrix while it runs.
    """
    means = mean_over_inputs(work, _products, prompts=True)
    in_order = sorted(means, key=lambda key: key[1] == "embedding")  # of two roles the embedding's is written last
    return {name: means[name, role].to(torch.float32) for name, role in in_order}

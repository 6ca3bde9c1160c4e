"""Diagonal Fisher information: E over rows of sum over answers y of p(y) (d log p(y | prompt) / d theta)^2.

The sum runs over all answers that a row may have: choices, or classes. log p and the weights p(y) are the evaluator's
(`evaluation.Answering`). A row whose answers cannot be listed, as in generation, has its right answer alone with weight
1, which is the empirical information of `fisher`.
Sources: Fisher merging, arXiv 2111.09832; DF-Merge, arXiv 2504.18992 (its released code sums over choices).
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.statistics.backward import mean_of_gradients
from merge_search.engine.statistics.rows import Work

__all__ = ["measure"]


def measure(work: Work) -> dict[str, Tensor]:
    """Return by tensor name a float32 tensor of the tensor's shape; zero where the loss does not reach."""
    return mean_of_gradients(work, torch.square, work.each_answer())

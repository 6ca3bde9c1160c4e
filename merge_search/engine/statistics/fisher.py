"""Diagonal empirical Fisher information: E over rows of (d log p(answer | prompt) / d theta)^2.

*Empirical* means that the answer is the right one. The proper Fisher information takes the mean over answers that the
model itself gives, and costs one backward pass per choice. log p is the mean over the answer's tokens, as in DF-Merge's
release, so that long answers do not weigh more. The gradient of every row is squared separately, because squares of
batch gradients would add cross terms. The measure ``fisher`` adds its ``floor`` afterwards. Half-precision gradients
below 6e-8 (float16) are lost: use bfloat16 or float32.
Sources: Fisher merging, arXiv 2111.09832; DF-Merge, arXiv 2504.18992 (sums over choices, 30 rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.statistics.backward import mean_of_gradients
from merge_search.engine.statistics.rows import Work

__all__ = ["measure"]


def measure(work: Work) -> dict[str, Tensor]:
    """Return by tensor name a float32 tensor of the tensor's shape; zero where the loss does not reach."""
    return mean_of_gradients(work, torch.square)

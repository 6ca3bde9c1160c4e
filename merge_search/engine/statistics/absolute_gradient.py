"""Mean over rows of |gradient of a row's loss| at the base.

Source: Task Arithmetic in the Trust Region, arXiv 2501.15065.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.statistics.backward import mean_of_gradients
from merge_search.engine.statistics.rows import Work

__all__ = ["measure"]


def measure(work: Work) -> dict[str, Tensor]:
    """Return by tensor name a float32 tensor of the tensor's shape; zero where the loss does not reach."""
    return mean_of_gradients(work, torch.abs)

"""Mean gradient of the expert's loss at the base: an input of APL's partition product and of |gradient x delta|.

Source: APL, arXiv 2408.09485 (gradient of the pretrained model on a few rows of the task).
"""

from __future__ import annotations

from torch import Tensor

from merge_search.engine.statistics.backward import mean_of_gradients
from merge_search.engine.statistics.rows import Work

__all__ = ["measure"]


def measure(work: Work) -> dict[str, Tensor]:
    """Return by tensor name a signed float32 tensor of the tensor's shape; zero where the loss does not reach."""
    return mean_of_gradients(work, lambda gradient: gradient)

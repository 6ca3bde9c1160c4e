"""Population variance of the deltas over all experts; an expert that left the tensor alone counts as a zero delta.

Source: SCE (FuseChat), arXiv 2408.07990.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from merge_search.engine.assess import AssessContext
from merge_search.recipe import Scalar

__all__ = ["numbers", "scores"]


def numbers(options: Mapping[str, Scalar], reduced: Sequence[tuple[float, ...]], n_experts: int) -> list[float]:
    """1 / number of experts, and that number."""
    return [1.0 / n_experts, float(n_experts)]


def scores(context: AssessContext) -> list[Tensor]:
    share, count = context.numbers
    total = context.deltas[0]
    for t in context.deltas[1:]:
        total = total + t
    mean = total * share
    absent = count - float(len(context.deltas))
    spread = absent * (mean * mean)
    for t in context.deltas:
        spread = spread + (t - mean) * (t - mean)
    return [spread * share] * len(context.deltas)

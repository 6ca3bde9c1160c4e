"""Population variance of the deltas over all experts. An expert that did not change the tensor counts as a zero delta.

Source: SCE (FuseChat), arXiv 2408.07990.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from merge_search.engine.methods.assess import AssessContext
from merge_search.recipe import Scalar

__all__ = ["numbers", "scores"]


def numbers(
    options: Mapping[str, Scalar], reduced: Sequence[tuple[float, ...]], n_experts: int, n_active: int
) -> list[float]:
    """Return 1 / number of experts; then, if there are any, the number of experts that did not change the tensor."""
    absent = n_experts - n_active
    return [1.0 / n_experts, float(absent)] if absent else [1.0 / n_experts]


def scores(context: AssessContext) -> list[Tensor]:
    """Return the variance for each expert, float32."""
    share, *absent = context.numbers
    total = context.deltas[0]
    for t in context.deltas[1:]:
        total = total + t
    mean = total * share
    squares = [count * (mean * mean) for count in absent]
    squares += [(t - mean) * (t - mean) for t in context.deltas]
    spread = squares[0]
    for square in squares[1:]:
        spread = spread + square
    return [spread * share] * len(context.deltas)

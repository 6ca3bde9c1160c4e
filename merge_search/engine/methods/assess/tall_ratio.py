"""|delta_i| / |sum of the other deltas|: how much of an entry is this expert's own.

Zero over zero is 0, anything else over zero is infinite. ``score > t`` is the TALL mask of threshold t.
Source: Consensus / TALL masks, OpenReview DWT9uiGjxT (ICML 2024).
"""

from __future__ import annotations

from torch import Tensor

from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return the ratio of each expert, float32."""
    total = context.deltas[0]
    for t in context.deltas[1:]:
        total = total + t
    return [_ratio(t.abs(), (total - t).abs()) for t in context.deltas]


def _ratio(mine: Tensor, others: Tensor) -> Tensor:
    return mine / (others + (mine == 0))

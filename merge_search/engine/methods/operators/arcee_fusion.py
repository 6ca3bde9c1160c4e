"""Arcee Fusion: keeps only the changes that matter most, by size and by effect on the softmax of their row."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.matrix import oriented
from merge_search.engine.methods.operators.remember import remembered

__all__ = ["importance", "parts", "quantile"]


@remembered("arcee_fusion")
def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = tau_i where its importance is at least median + ``multiple`` * (Q_3/4 - Q_1/4), else 0.

    Importance is |tau| * KL(softmax(row of theta_i) || softmax(row of theta_0)). A row belongs to one output; a vector
    is one row. The method was published for one expert. Several experts are treated separately and added up.
    Differs: quantiles of all elements, where mergekit samples a million; no 1e-8 is added to probabilities.

    Returns:
        float32, one tensor per expert.
    Source: mergekit's ``arcee_fusion``.
    """
    result = []
    base = oriented(context, context.base) if context.base.ndim > 1 else context.base.reshape(1, -1)
    for delta in context.deltas:
        tau = oriented(context, delta) if delta.ndim > 1 else delta.reshape(1, -1)
        score = importance(base, tau)
        ordered = torch.sort(score.reshape(-1)).values
        low, median, high = (quantile(ordered, q) for q in (0.25, 0.5, 0.75))
        kept = torch.where(score >= median + context.number("multiple") * (high - low), tau, 0.0)
        result.append((oriented(context, kept) if delta.ndim > 1 else kept).reshape(delta.shape))
    return result


def importance(base: Tensor, delta: Tensor) -> Tensor:
    """Return |delta| times the divergence of its row.

    Args:
        base: Shape (..., rows, columns), float32.
        delta: Same shape, float32.
    Returns:
        Same shape, float32. The KL divergence is computed in float64, because it is tiny.
    """
    log_q = torch.log_softmax(base, -1, dtype=torch.float64)
    log_p = torch.log_softmax(base + delta, -1, dtype=torch.float64)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True).clamp_min(0.0)
    return (delta.abs() * divergence).to(torch.float32)


def quantile(ordered: Tensor, q: float) -> float:
    """Return a quantile, linear between neighbours. `torch.quantile` refuses more than 2**24 elements.

    Args:
        ordered: Shape (n,), ascending.
        q: In [0, 1].
    """
    if not ordered.numel():
        return 0.0
    position = q * (ordered.numel() - 1)
    low = int(position)
    high = min(low + 1, ordered.numel() - 1)
    return float(ordered[low]) + (position - low) * (float(ordered[high]) - float(ordered[low]))

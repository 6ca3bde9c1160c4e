"""A teacher's output distributions, stored compactly and compared with the live model's.

    KL(p || q) = sum_y p(y) (log p(y) - log q(y))        p: the teacher's, y: classes, choices or tokens

Of many outcomes the `TOP` likeliest are stored, and all others as one outcome. The divergence over these outcomes is a
lower bound of the divergence over all of them, and it is zero where the full divergence is zero. Log-probabilities are
stored in float16, exact to 0.05 %, and normalised when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TOP", "TeacherOutputs", "divergence", "join"]

TOP = 64
"""Number of outcomes stored per distribution over a vocabulary, six bytes each. On most answers experts give all other
outcomes together less than 1 %."""

_LOWEST = -60.0
"""Log-probability below which an outcome does not count."""


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's output distributions, one a row.

    Attributes:
        log_p: Shape (n, k), float16. Where `outcomes` are given, the last column stands for all other outcomes
            together.
        outcomes: The stored outcomes, shape (n, k - 1), int32. None: all outcomes, in their order.
    """

    log_p: NDArray[np.float16]
    outcomes: NDArray[np.int32] | None = None

    @classmethod
    @torch.no_grad()
    def from_log_p(cls, log_p: Tensor, *, top: int | None = None) -> TeacherOutputs:
        """Store log-probabilities.

        Args:
            log_p: Shape (n, outcomes).
            top: The number of outcomes to store besides all others together; None: every outcome.
        """
        n_outcomes = log_p.shape[1]
        if top is None or n_outcomes <= top + 1:
            return cls(_half(log_p))
        largest, outcomes = log_p.topk(top, dim=1)
        both = torch.cat([largest, _others(log_p, outcomes)], 1)
        return cls(_half(both), outcomes.to(torch.int32).cpu().numpy())

    def __getitem__(self, rows: slice | list[int]) -> TeacherOutputs:
        return TeacherOutputs(self.log_p[rows], None if self.outcomes is None else self.outcomes[rows])


def join(parts: list[TeacherOutputs]) -> TeacherOutputs:
    """All rows of `parts`, one part below the other.

    A part with fewer columns (a question with fewer choices) is padded with outcomes of probability zero.
    """
    width = max(p.log_p.shape[1] for p in parts)
    padded = [np.pad(p.log_p, ((0, 0), (0, width - p.log_p.shape[1])), constant_values=-np.inf) for p in parts]
    kept = [p.outcomes for p in parts if p.outcomes is not None]
    return TeacherOutputs(np.concatenate(padded), np.concatenate(kept) if kept else None)


def divergence(outputs: TeacherOutputs, log_q: Tensor) -> Tensor:
    """KL from the teacher to the live model, row by row, with a graph to `log_q`.

    Args:
        outputs: The teacher's, n rows.
        log_q: The live model's, normalised. Shape (n, outcomes), float32 or float64. -inf where an outcome cannot
            happen.

    Returns:
        Shape (n,), the dtype of `log_q`. Never negative, except by rounding.
    """
    log_p = torch.from_numpy(outputs.log_p).to(log_q.device, log_q.dtype).log_softmax(1)
    if outputs.outcomes is not None:
        outcomes = torch.from_numpy(outputs.outcomes).to(log_q.device, torch.int64)
        log_q = torch.cat([log_q.gather(1, outcomes), _others(log_q, outcomes)], 1)
    # NOTE: zero times -inf is NaN, so outcomes that do not count are taken out before the product.
    impossible = log_p < _LOWEST
    terms = log_p.exp() * (log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0))
    return terms.sum(1)


def _others(log_p: Tensor, outcomes: Tensor) -> Tensor:
    """Log-probability of all outcomes but these. Shape (n, 1)."""
    return log_p.scatter(1, outcomes, -torch.inf).logsumexp(1, keepdim=True)


def _half(log_p: Tensor) -> NDArray[np.float16]:
    values: NDArray[np.float16] = log_p.to(torch.float16).cpu().numpy()
    return values

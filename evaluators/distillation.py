"""What an expert answered, as probabilities: kept small, compared with the live model's.

    KL(p || q) = sum_y p(y) (log p(y) - log q(y))        p: the expert's, y: classes, choices, or tokens

Of many outcomes the likeliest `TOP` are kept, and the rest as one: the divergence of these is a lower bound of the whole
one, and zero where the whole one is. float16 log-probabilities are exact to 0.05 %, and made to sum to one when read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TOP", "Told", "divergence", "join", "tell"]

TOP = 64
"""Outcomes kept, of a vocabulary: six bytes each. What experts leave to the others is below 1 % on most answers."""

_LOWEST = -60.0  # a log-probability that weighs nothing


@dataclass(frozen=True)
class Told:
    """Distributions of an expert.

    Attributes:
        log_p: Shape (n, k), float16; where `outcomes` are given the last column is all others together.
        outcomes: Which are kept: shape (n, k - 1), int32; None: all, in their order.
    """

    log_p: NDArray[np.float16]
    outcomes: NDArray[np.int32] | None = None

    def __getitem__(self, rows: slice | list[int]) -> Told:
        return Told(self.log_p[rows], None if self.outcomes is None else self.outcomes[rows])


@torch.no_grad()
def tell(log_p: Tensor, *, top: int | None = None) -> Told:
    """Keep log-probabilities of shape (n, outcomes); with `top` the likeliest and the rest, where there are more."""
    n_outcomes = log_p.shape[1]
    if top is None or n_outcomes <= top + 1:
        return Told(_half(log_p))
    found, outcomes = log_p.topk(top, dim=1)
    both = torch.cat([found, _others(log_p, outcomes)], 1)
    return Told(_half(both), outcomes.to(torch.int32).cpu().numpy())


def join(parts: list[Told]) -> Told:
    """One below the other; columns that some lack are outcomes that cannot happen (choices of a longer question)."""
    width = max(p.log_p.shape[1] for p in parts)
    padded = [np.pad(p.log_p, ((0, 0), (0, width - p.log_p.shape[1])), constant_values=-np.inf) for p in parts]
    kept = [p.outcomes for p in parts if p.outcomes is not None]
    return Told(np.concatenate(padded), np.concatenate(kept) if kept else None)


def divergence(told: Told, log_q: Tensor) -> Tensor:
    """KL from the expert to the live model, row by row, with a graph to `log_q`.

    Args:
        log_q: Normalised, shape (n, outcomes), float32 or float64; -inf where an outcome cannot happen.
    Returns:
        Shape (n,), the dtype of `log_q`; not negative but for rounding.
    """
    log_p = torch.from_numpy(told.log_p).to(log_q.device, log_q.dtype).log_softmax(1)
    if told.outcomes is not None:
        outcomes = torch.from_numpy(told.outcomes).to(log_q.device, torch.int64)
        log_q = torch.cat([log_q.gather(1, outcomes), _others(log_q, outcomes)], 1)
    impossible = log_p < _LOWEST  # zero times -inf is no number; what weighs nothing has no say
    terms = log_p.exp() * (log_p.masked_fill(impossible, 0.0) - log_q.masked_fill(impossible, 0.0))
    return terms.sum(1)


def _others(log_p: Tensor, outcomes: Tensor) -> Tensor:
    """Log of the probability of all but these. Shape (n, 1)."""
    return log_p.scatter(1, outcomes, -torch.inf).logsumexp(1, keepdim=True)


def _half(log_p: Tensor) -> NDArray[np.float16]:
    values: NDArray[np.float16] = log_p.to(torch.float16).cpu().numpy()
    return values

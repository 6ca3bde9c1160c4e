"""The steps of a pass that have two forms: one for torch, which runs them at once, and one for a compiler.

Both forms give the same numbers. Each is the faster one where it is used: torch is charged by the operation and prefers
products with masks, while compilers turn selections into vector masks. `execute.runner` chooses one set per pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["EAGER", "TINY", "Eager", "Mask", "Primitives", "total_of"]

Mask = Tensor | None
"""A boolean or soft mask; None keeps everything."""

TINY = torch.finfo(torch.float32).tiny


def total_of(terms: Sequence[Tensor]) -> Tensor:
    """Sum in the order given."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class Primitives(Protocol):
    """Steps of a pass over the elements of one tensor. Either all masks of `agreed` are None, or none is."""

    def keep(self, x: Tensor, m: Mask) -> Tensor:
        """m x."""
        ...

    def winsorise(self, t: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """sign(t) min(max(|t|, low), high)."""
        ...

    def top(self, a: Tensor, low: Tensor, high: Tensor, cut: Tensor, place: Tensor) -> Tensor:
        """Whether a >= high, or a >= low and the place among equals is no later than the cut."""
        ...

    def soft(self, a: Tensor, low: Tensor, slope: Tensor, flat: Tensor) -> Tensor:
        """max(a - low, 0) slope, plus `flat` where a >= low. Without a range of scores `slope` is 0 and `flat` is 1."""
        ...

    def per_probability(self, t: Tensor, x: Tensor, p: Tensor, m: Mask, *, is_positive: bool) -> Tensor:
        """m t / p, with `x` = m t. `is_positive`: p is positive wherever m keeps."""
        ...

    def agreements(self, votes: Sequence[Tensor], total: Tensor, tie: Tensor | float) -> list[Tensor]:
        """Whether each vote is not zero and has the sign of the total, or of `tie` where the total is zero."""
        ...

    def added(self, factors: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Mask]) -> Tensor:
        """Sum of factor times entry over the experts that agree. A zero may be -0, which `over` does not pass on."""
        ...

    def added_scores(
        self, factors: Sequence[Tensor], b: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Mask]
    ) -> Tensor:
        """`added` of score times entry; scores are finite."""
        ...

    def weighed(self, factors: Sequence[Tensor], weight: Sequence[Tensor], agreed: Sequence[Mask]) -> Tensor:
        """Sum of finite factors, each times its weight. Masks in `agreed`, if any, are the weights themselves."""
        ...

    def counted(self, alive: Sequence[Tensor]) -> Tensor:
        """How many are true. float32."""
        ...

    def over(self, top: Tensor, bottom: Tensor) -> Tensor:
        """top / bottom; 0 where bottom is 0."""
        ...


class Eager:
    """The steps for torch."""

    def keep(self, x: Tensor, m: Mask) -> Tensor:
        if m is None:
            return x
        if m.dtype != torch.bool:
            return m * x
        return x * m + 0.0  # a quarter of the time of `where` on CPUs; + 0.0 turns a dropped negative's -0.0 into 0.0

    def winsorise(self, t: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return torch.sign(t) * torch.clamp(t.abs(), low, high)

    def top(self, a: Tensor, low: Tensor, high: Tensor, cut: Tensor, place: Tensor) -> Tensor:
        return (a >= high) | ((a >= low) & (place <= cut))

    def soft(self, a: Tensor, low: Tensor, slope: Tensor, flat: Tensor) -> Tensor:
        return torch.clamp(a - low, min=0.0) * slope + (a >= low) * flat

    def per_probability(self, t: Tensor, x: Tensor, p: Tensor, m: Mask, *, is_positive: bool) -> Tensor:
        return x / torch.clamp(p, min=TINY)

    def agreements(self, votes: Sequence[Tensor], total: Tensor, tie: Tensor | float) -> list[Tensor]:
        elected = torch.sign(total) + (total == 0) * tie
        return [t * elected > 0 for t in votes]

    def added(self, factors: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Mask]) -> Tensor:
        return total_of([f * self.keep(t, m) for f, t, m in zip(factors, x, agreed, strict=True)])

    def added_scores(
        self, factors: Sequence[Tensor], b: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Mask]
    ) -> Tensor:
        return total_of([f * (s * self.keep(t, m)) for f, s, t, m in zip(factors, b, x, agreed, strict=True)])

    def weighed(self, factors: Sequence[Tensor], weight: Sequence[Tensor], agreed: Sequence[Mask]) -> Tensor:
        return total_of([f * w for f, w in zip(factors, weight, strict=True)])

    def counted(self, alive: Sequence[Tensor]) -> Tensor:
        return total_of([m.to(torch.float32) for m in alive])

    def over(self, top: Tensor, bottom: Tensor) -> Tensor:
        zero = bottom == 0
        return top / (bottom + zero) * ~zero + 0.0


EAGER: Primitives = Eager()

"""The two-form steps of a pass, in the form that compilers turn into vector instructions; see `methods.primitives`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_search.engine.methods.primitives import TINY, Mask, Primitives, total_of

__all__ = ["TRACED", "Traced"]

_SIGN = -(2**31)  # the sign bit of a float32
_LEAST = 2.0**-149  # the smallest positive float32


class Traced:
    """The steps for a compiler: selections by `where`, signs as bits."""

    def keep(self, x: Tensor, m: Mask) -> Tensor:
        if m is None:
            return x
        return torch.where(m, x, 0.0) if m.dtype == torch.bool else m * x

    def winsorise(self, t: Tensor, low: Tensor, high: Tensor) -> Tensor:
        size = torch.clamp(t.abs(), low, high)
        return torch.where(t == 0, 0.0, (size.view(torch.int32) | (t.view(torch.int32) & _SIGN)).view(torch.float32))

    def top(self, a: Tensor, low: Tensor, high: Tensor, cut: Tensor, place: Tensor) -> Tensor:
        return a >= torch.where(place <= cut, low, high)

    def soft(self, a: Tensor, low: Tensor, slope: Tensor, flat: Tensor) -> Tensor:
        return torch.where(a >= low, (a - low) * slope + flat, 0.0)

    def per_probability(self, t: Tensor, x: Tensor, p: Tensor, m: Mask, *, is_positive: bool) -> Tensor:
        return self.keep(t / p, m) if is_positive else x / torch.clamp(p, min=TINY)

    def agreements(self, votes: Sequence[Tensor], total: Tensor, tie: Tensor | float) -> list[Tensor]:
        plus = total > (torch.where(tie > 0, -_LEAST, 0.0) if isinstance(tie, Tensor) else -_LEAST * (tie > 0))
        flip = torch.where(plus, 0.0, -0.0).view(torch.int32)  # the elected sign bit: votes above zero without it agree
        return [(t.view(torch.int32) ^ flip) > 0 for t in votes]

    def added(self, factors: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Mask]) -> Tensor:
        total = torch.zeros_like(x[0])
        for i, (f, t, m) in enumerate(zip(factors, x, agreed, strict=True)):
            if m is None:
                return total_of([f * t for f, t in zip(factors, x, strict=True)])
            total = torch.where(m, total + f * t if i else f * t, total)
        return total

    def added_scores(
        self, factors: Sequence[Tensor], b: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Mask]
    ) -> Tensor:
        return self.added(factors, [s * t for s, t in zip(b, x, strict=True)], agreed)

    def weighed(self, factors: Sequence[Tensor], weight: Sequence[Tensor], agreed: Sequence[Mask]) -> Tensor:
        if agreed[0] is None:
            return total_of([f * w for f, w in zip(factors, weight, strict=True)])
        return self.added(factors, [torch.ones_like(w) for w in weight], agreed)

    def counted(self, alive: Sequence[Tensor]) -> Tensor:
        count = alive[0].to(torch.float32)
        for m in alive[1:]:
            count = torch.where(m, count + 1.0, count)
        return count

    def over(self, top: Tensor, bottom: Tensor) -> Tensor:
        return torch.where(bottom == 0, 0.0, top / bottom) + 0.0


TRACED: Primitives = Traced()

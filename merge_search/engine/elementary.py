"""Functions made of the four operations alone: the same bits compiled and not, and several times the library's speed."""

from __future__ import annotations

from torch import Tensor

__all__ = ["tanh"]

_LIMIT = 9.1  # from here on tanh is 1 in float32


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, relative error below 1e-6 for every float32. float32, same shape; NaN stays NaN.

    Lambert's continued fraction, cut after the fifteenth odd number, at x / 4; then twice tanh 2y = 2 t / (1 + t^2).
    In place where it can be: uncompiled, fresh memory costs more than the arithmetic.
    """
    y = x.clamp(-_LIMIT, _LIMIT).mul_(0.25)
    square = y * y
    top = (square * 36.0).add_(6930.0).mul_(square).add_(270270.0).mul_(square).add_(2027025.0)
    bottom = (square + 630.0).mul_(square).add_(51975.0).mul_(square).add_(945945.0).mul_(square).add_(2027025.0)
    t = top.div_(bottom).mul_(y)
    for _ in range(2):
        below = (t * t).add_(1.0)
        t.add_(t).div_(below)
    return t.clamp_(-1.0, 1.0)

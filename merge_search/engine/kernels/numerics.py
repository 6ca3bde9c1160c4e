"""Elementary functions made of the four operations and of bits, and a test for finite numbers.

Compiled or not, they give the same result, and their loops vectorise.
Ranges are reduced and polynomials fitted as in the classical single-precision libraries (Cody and Waite; Cephes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["exp", "is_finite", "log", "sigmoid", "tanh"]

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


_ROUNDED = 1.5 * 2.0**23  # added and taken away again, it leaves the nearest whole number
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip


def exp(x: Tensor) -> Tensor:
    """e to the x, relative error below 3e-7 where the result is a normal number. float32, same shape; NaN stays NaN."""
    x = x.clamp(-104.0, 89.0)
    k = (x * 1.44269504088896341).add_(_ROUNDED).sub_(_ROUNDED)
    r = (x - k * _LN2_HIGH).sub_(k * _LN2_LOW)
    p = _polynomial(_EXP, r).mul_(r).mul_(r).add_(r).add_(1.0)
    whole = k.to(torch.int32)
    half = whole >> 1
    return p.mul_(_power(half)).mul_(_power(whole - half))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    p = (x * coefficients[0]).add_(coefficients[1])
    for c in coefficients[2:]:
        p = p.mul_(x).add_(c)
    return p


def _power(k: Tensor) -> Tensor:
    """2 to the k for int32 k in -126..127."""
    return ((k + 127) << 23).view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)). float32."""
    return 1.0 / exp(-x).add_(1.0)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of x >= 0, error below 2e-7 of the larger of 1 and |log x|. float32; log 0 is -infinity."""
    tiny = (x < 2.0**-126).to(torch.float32)
    bits = (x * (tiny * (2.0**24 - 1) + 1.0)).view(torch.int32)
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    large = (m > 1.41421356).to(torch.float32)
    m = (m * (1.0 - large * 0.5)).sub_(1.0)
    e = ((bits >> 23) - 127).to(torch.float32) + large - tiny * 24.0
    square = m * m
    p = _polynomial(_LOG, m).mul_(m).mul_(square).add_(e * _LN2_LOW).sub_(square * 0.5)
    result = (m + p).add_(e * _LN2_HIGH)
    return torch.where(x == 0, -torch.inf, torch.where(x == torch.inf, x, result))


def is_finite(x: Tensor) -> bool:
    """Whether there is no NaN and no infinity; one read of memory, where `torch.isfinite` makes three."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)
    return math.isfinite(float(low)) and math.isfinite(float(high))

"""Counter-based random numbers: a pure function of (seed, expert, tensor, element).

There is no generator and no state. The bits are the same on every device, in every chunking, in the search and in the
export, and in every order of the experts. A mask ``u < density`` is nested: a higher density only adds parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge_search.seeding import derive_seed

__all__ = ["draw", "draw_limit", "indices", "mask_keys", "mix", "uniform", "wrapped"]

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
"""Odd 32-bit constants: those of the public-domain hash `lowbias32`."""


def mask_keys(seed: int, expert: str, tensor: str) -> tuple[int, int]:
    """Two signed 32-bit keys of the stream of one expert and tensor. They depend on names, never on positions."""
    bits = derive_seed(seed, "mask", expert, tensor, bits=62)
    return (bits & 0xFFFFFFFF) - 2**31, (bits >> 32) - 2**29


def wrapped(position: int) -> int:
    """A position as a signed 32-bit number: positions repeat after 2**32 elements, which repeats random patterns."""
    return (position + 2**31) % 2**32 - 2**31


def indices(n: int, offset: int | Tensor = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """Positions offset .. offset + n - 1 as int32, wrapped at 2**32."""
    if isinstance(offset, int):
        offset = wrapped(offset)
    return torch.arange(n, dtype=torch.int32, device=device) + offset


def mix(index: Tensor, first: Tensor | int, second: Tensor | int) -> Tensor:
    """32 well-mixed bits per element.

    There are two keys because a single key that is only added would make one stream a shifted copy of another.

    Args:
        index: int32, any shape.
        first, second: Keys, ints or 0-d int32 tensors.
    Returns:
        int32, same shape. Integer arithmetic modulo 2**32 only: equal on every device.
    """
    h = index + first
    h = h ^ ((h >> 16) & 0xFFFF)
    h = (h * _MULTIPLIERS[0]) ^ second
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _MULTIPLIERS[1]
    return h ^ ((h >> 16) & 0xFFFF)


def uniform(index: Tensor, first: Tensor | int, second: Tensor | int) -> Tensor:
    """Uniform numbers on the grid k / 2**24 in [0, 1). float32, same shape as `index`."""
    return draw(index, first, second).to(torch.float32) * (1.0 / 2**24)


def draw(index: Tensor, first: Tensor | int, second: Tensor | int) -> Tensor:
    """`uniform` times 2**24, as int32: whole numbers compare faster."""
    return (mix(index, first, second) >> 8) & 0xFFFFFF


def draw_limit(probability: float) -> int:
    """``draw < draw_limit(p)`` exactly where ``uniform < p``."""
    return math.ceil(probability * 2**24)

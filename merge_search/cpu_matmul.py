"""Float32 matrix products on a CPU by oneDNN, where it is as exact as the library that torch takes by itself.

torch hands float32 products to MKL, which on processors of other makers than its own keeps to half of their vector width:
there oneDNN answers and differentiates a wide model in half to two thirds of the time (`benchmarks/products.py`). torch
gives it the products when they may be computed in bfloat16; on a processor whose matrix unit would really do that, `exact`
is false and everything stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["exact", "fast_products", "short_attention"]

_NARROWEST = 256
"""Least width of most of the weights: below, oneDNN's cost per call is more than it saves."""
_SHORT = 256
"""Tokens up to which attention as plain products is faster than torch's tiles, whose products are then too small."""
_TOLERANCE = 1e-5
"""Of a product over 512 terms, relative: float32 is wrong by less than 1e-6, bfloat16 by more than 1e-3."""

_MIXED = "mixed"


@contextmanager
def fast_products(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, float32 products on the CPU run on oneDNN if that pays for a model of these `weights`; else as usual.

    The setting is the process's, for all its threads, and is put back afterwards. Exact to float32, not bit for bit the same
    as outside: merges are computed outside, so the weights of a recipe do not depend on it. A program that chose precisions
    backend by backend keeps its choice.
    """
    if _current() == _MIXED or not (_is_wide(weights) and exact()):
        yield
        return
    with _precision("medium"):
        yield


def short_attention(length: int, device: torch.device) -> AbstractContextManager[None]:
    """For a pass over sequences of `length` tokens inside `fast_products`; outside of it, or for long ones, nothing."""
    if device.type != "cpu" or length > _SHORT or _current() != "medium":
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


@cache
def exact() -> bool:
    """Whether oneDNN takes the products and computes them in float32: asked once, of one product."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 512, generator=generator) for _ in range(2))
    true = left.double() @ right.double().T
    with _precision("highest"):
        usual = left @ right.T
    with _precision("medium"):
        other = left @ right.T
    error = float((other - true).abs().max() / true.abs().max())
    return error < _TOLERANCE and not torch.equal(usual, other)


def _current() -> str:
    """torch's one setting for all backends; torch refuses to name one where they were set one by one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return _MIXED


@contextmanager
def _precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_wide(weights: Mapping[str, Tensor]) -> bool:
    """Most elements lie in float32 matrices on the CPU, no side of which is narrow."""
    wide = total = 0
    for tensor in weights.values():
        total += tensor.numel()
        if tensor.ndim == 2 and tensor.dtype == torch.float32 and tensor.device.type == "cpu":
            wide += tensor.numel() if min(tensor.shape) >= _NARROWEST else 0
    return 2 * wide > total

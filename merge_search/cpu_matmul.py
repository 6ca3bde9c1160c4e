"""Float32 matrix products on a CPU by oneDNN, where it is as exact as the library that torch uses by default.

torch gives float32 products to MKL, which uses half of the vector width on processors of other makers than Intel. There
oneDNN's forward and backward passes of a wide model take half to two thirds of the time (`benchmarks/cpu_matmul.py`).
torch gives the products to oneDNN when they may be computed in bfloat16. On a processor whose matrix unit would really
compute them so, `exact` is false and nothing is changed.
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
"""Least width of most of the weights. Below it, oneDNN's cost per call exceeds the time that it saves."""
_SHORT = 256
"""Most tokens for which attention as plain products is faster than torch's tiles, whose products are then too small."""
_TOLERANCE = 1e-5
"""Largest relative error of a product over 512 terms. float32 errs by less than 1e-6, bfloat16 by more than 1e-3."""

_MIXED = "mixed"


@contextmanager
def fast_products(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run float32 products on the CPU on oneDNN inside the context, if that pays for a model of these `weights`.

    The setting holds for the whole process with all its threads, and is restored on exit. The results are exact to
    float32, but their bits differ from those outside. Merges are computed outside, so the weights of a recipe do not
    depend on the setting. A program that set precisions backend by backend keeps its choice.

    Args:
        weights: Tensors of the model by name.
    """
    if _current() == _MIXED or not (_is_wide(weights) and exact()):
        yield
        return
    with _precision("medium"):
        yield


def short_attention(length: int, device: torch.device) -> AbstractContextManager[None]:
    """Return a context for a pass over sequences of `length` tokens inside `fast_products`.

    It computes attention as plain products. It changes nothing outside `fast_products`, on a GPU, or for long
    sequences.
    """
    if device.type != "cpu" or length > _SHORT or _current() != "medium":
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


@cache
def exact() -> bool:
    """Whether oneDNN takes the products and computes them in float32. Found out once, from one product."""
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
    """Return torch's one setting for all backends, or `_MIXED` where they were set one by one and torch names none."""
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
    """Whether most elements are in float32 matrices on the CPU that are not narrow in either direction."""
    wide = total = 0
    for tensor in weights.values():
        total += tensor.numel()
        if tensor.ndim == 2 and tensor.dtype == torch.float32 and tensor.device.type == "cpu":
            wide += tensor.numel() if min(tensor.shape) >= _NARROWEST else 0
    return 2 * wide > total

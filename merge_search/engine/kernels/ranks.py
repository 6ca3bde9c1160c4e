"""Ranks and histograms of scores. With a compiler they are made in C++, else by torch; the integers are the same.

The bits of a score become a 32-bit key that orders as the numbers do. Ranks are made by radix sort: 11 bits at a time,
least significant first, and only the bits in which the keys of a row differ. Histograms count the upper bits of keys.
Scores |own - base| are computed while they are read and never stored.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from merge_search.engine.codegen.compiler import CompilerError, library, read_source
from merge_search.engine.codegen.dtypes import C_TYPES

__all__ = ["BITS", "count_deltas", "count_scores", "counts_at_once", "counts_from", "delta_ranks", "row_ranks"]

BITS = 20
"""Upper bits of a key that number its bin in a histogram."""

_PART = 2**18  # elements that are worth a thread of their own, or converted at a time
_LONGEST = 2**31  # entries of a row: the sort keeps positions in 32 bits
_READ = (torch.float32, torch.bfloat16, torch.float16)
_RANKS = {torch.int16: "short", torch.int32: "int", torch.float32: "float"}

log = logging.getLogger(__name__)


def row_ranks(scores: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """Rank of every element within its row: 0 is the largest, and of equal ones the first. Same shape.

    A row is the last axis; a one-dimensional tensor is one row.

    Args:
        scores: Floating. NaN ranks above all numbers, as torch sorts it.
        dtype: Of the result: int16, int32 or float32, which rounds what it cannot hold.
    """
    return _in_c(None, scores, dtype) if _is_plain(scores) else _sorted(scores, dtype)


def delta_ranks(base: Tensor, own: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """`row_ranks` of |own - base|, subtracted in float32; base and own are finite and of one shape."""
    if _is_plain(base) and _is_plain(own):
        return _in_c(base, own, dtype)
    return row_ranks((own.to(torch.float32) - base.to(torch.float32)).abs(), dtype)


def _is_plain(t: Tensor) -> bool:
    fits = t.ndim > 0 and 0 < t.shape[-1] < _LONGEST and t.numel() > 0
    return fits and t.device.type == "cpu" and t.is_contiguous() and t.dtype in _READ


def _sorted(scores: Tensor, dtype: torch.dtype) -> Tensor:
    if scores.ndim == 0:
        return torch.zeros((), dtype=dtype, device=scores.device)
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).to(dtype).expand(scores.shape)
    return torch.empty_like(order, dtype=dtype).scatter_(-1, order, places)


def _in_c(base: Tensor | None, own: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows are shared out among as many threads as torch has; nothing depends on how many."""
    loaded = _loaded(None if base is None else base.dtype, own.dtype)
    if loaded is None:
        return _sorted(own if base is None else (own.to(torch.float32) - base.to(torch.float32)).abs(), dtype)
    rank = loaded[f"rank_{_RANKS[dtype]}"]
    rank.restype = None
    out = torch.empty(own.shape, dtype=dtype)
    columns = own.shape[-1]
    rows = own.numel() // columns

    def run(first: int, last: int) -> None:
        work = np.empty(2 * columns, dtype=np.uint64)
        shape = (ctypes.c_int64(n) for n in (first, last, columns))
        rank(_place(base), _place(own), *shape, _place(out), ctypes.c_void_p(work.ctypes.data))

    threads = min(torch.get_num_threads(), rows, -(-own.numel() // _PART))
    if threads <= 1:
        run(0, rows)
    else:
        edges = [rows * t // threads for t in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, edges[:-1], edges[1:]))
    return out


def counts_at_once(scores: Tensor) -> bool:
    """Whether `count_scores` is as cheap in small parts as in large ones."""
    return _is_plain(scores) and _loaded(None, scores.dtype) is not None


def count_scores(scores: Tensor, counts: Tensor) -> None:
    """Add to `counts` how many scores lie in each bin of the upper `BITS` bits of a key, the smallest numbers first.

    Args:
        scores: Flat, float32, no NaN.
        counts: int64, shape (2**BITS,), on the device of `scores`.
    """
    loaded = _loaded(None, scores.dtype) if _is_plain(scores) else None
    if loaded is not None:
        _count_in_c(loaded, None, scores, counts)
        return
    for part in torch.split(
        scores, 16 * _PART
    ):  # each count makes a whole histogram, which small parts would not repay
        bits = (part + 0.0).view(torch.int32)  # -0.0 becomes 0.0
        bins = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)) + 2 ** (BITS - 1)
        counts += torch.bincount(bins, minlength=2**BITS)


def counts_from(x: Tensor, edges: Tensor) -> list[int]:
    """How many numbers are no smaller than each edge.

    Args:
        x: Flat, no NaN.
        edges: Ascending, of the dtype and on the device of `x`.
    """
    loaded = _counter() if _is_plain(x) and x.dtype == torch.float32 else None
    if loaded is not None:
        counts, edges = np.zeros(len(edges), dtype=np.int64), edges.contiguous()
        n, last = ctypes.c_int64(x.numel()), ctypes.c_int32(len(edges))
        loaded(_place(x), n, _place(edges), last, ctypes.c_void_p(counts.ctypes.data))
        return [int(count) for count in counts]
    bins = torch.zeros(len(edges) + 1, dtype=torch.int64, device=x.device)
    for part in torch.split(x, _PART):
        bins += torch.bincount(torch.bucketize(part, edges, right=True), minlength=len(bins))
    above: list[int] = bins.flip(0).cumsum(0).flip(0)[1:].tolist()
    return above


def count_deltas(base: Tensor, own: Tensor, counts: Tensor) -> None:
    """`count_scores` of |own - base|, subtracted in float32; base and own are flat and finite."""
    loaded = _loaded(base.dtype, own.dtype) if _is_plain(base) and _is_plain(own) else None
    if loaded is not None:
        _count_in_c(loaded, base, own, counts)
        return
    device = counts.device
    for b, o in zip(torch.split(base, 16 * _PART), torch.split(own, 16 * _PART), strict=True):
        count_scores((o.to(device, torch.float32) - b.to(device, torch.float32)).abs(), counts)


def _count_in_c(loaded: ctypes.CDLL, base: Tensor | None, own: Tensor, counts: Tensor) -> None:
    assert counts.shape == (2**BITS,)
    assert counts.dtype == torch.int64
    assert counts.is_contiguous()
    loaded.count(_place(base), _place(own), ctypes.c_int64(own.numel()), ctypes.c_int32(32 - BITS), _place(counts))


def _place(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


# ------------------------------------------------------------------------------------------------ in C


@functools.cache
def _loaded(base: torch.dtype | None, own: torch.dtype) -> ctypes.CDLL | None:
    """The functions of `ranks.cpp` for these dtypes; None where there is no compiler."""
    value = C_TYPES[own].load("own[i]") + (f" - {C_TYPES[base].load('base[i]')}" if base else "")
    named = [f"typedef {C_TYPES[base or own].stored} B;", f"typedef {C_TYPES[own].stored} O;"]
    named += [f"#define KEY_VALUE(i) {value}", f"#define IS_DELTA {int(base is not None)}"]
    try:
        loaded = library("\n".join(["#include <stdint.h>", *named, read_source("kernels/ranks.cpp")]))
    except CompilerError as error:
        log.info("ranks and histograms are made without a compiler: %s", error)
        return None
    loaded.count.restype = None
    return loaded


@functools.cache
def _counter() -> Callable[..., None] | None:
    """`counts_from` in C; None where there is no compiler."""
    try:
        counter = library(read_source("kernels/counts_from.cpp")).counts_from
    except CompilerError as error:
        log.info("histograms are made without a compiler: %s", error)
        return None
    counter.restype = None
    return counter

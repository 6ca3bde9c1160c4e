"""Thresholds and largest values of tensors that a merge reads once, in two sweeps over memory and without a histogram.

The first sweep finds max |base| and max |delta| of every expert. For a threshold, a sample brackets the k-th largest
|delta|. The second sweep counts the values above the bracket and makes a histogram of those in it. Sweeps are C where
there is a compiler, else numpy and torch; the numbers are the same.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_search.engine.codegen.compiler import CompilerError, library, read_source
from merge_search.engine.passes.order_statistics import (
    BIN_SHIFT,
    EVERYTHING,
    GOLDEN_STRIDE,
    NOTHING,
    ZERO_BIN,
    Cut,
    Thresholds,
    bin_edges,
    cut_in_bin,
    place_in_bins,
)

__all__ = ["SweptThresholds", "cut_of_deltas", "largest_values"]

_CHUNK = 2**17
_SAMPLE = 2**14
_RUN = 8  # neighbours that a sample takes together: one wait for memory

log = logging.getLogger(__name__)


class SweptThresholds:
    """`Thresholds` of |own - base| of one tensor. Each cut is found by a sweep, all else from the whole histogram.

    Args:
        n: Elements of the tensor, above `EXACT_LIMIT`.
        maximum: The largest |own - base|.
        tensors: Gives base and own, flat, finite, on the CPU; they are not held.
        whole: Makes the thresholds from all scores.
    """

    stride = GOLDEN_STRIDE

    def __init__(
        self, n: int, maximum: float, tensors: Callable[[], tuple[Tensor, Tensor]], whole: Callable[[], Thresholds]
    ) -> None:
        self.n, self.maximum = n, maximum
        self._tensors, self._make_whole = tensors, whole
        self._whole: Thresholds | None = None

    def cut(self, k: int) -> Cut:
        """As `Thresholds.cut`. Cost: two sweeps over part of the tensor's memory, no histogram."""
        if k <= 0:
            return NOTHING
        if k >= self.n:
            return EVERYTHING
        if self._whole is not None:
            return self._whole.cut(k)
        return cut_of_deltas(*self._tensors(), k, self.maximum) or self._histogram().cut(k)

    @property
    def n_positive(self) -> int:
        """Scores in bins whose lower edge is above zero."""
        return self._histogram().n_positive

    def value(self, k: int) -> float:
        """As `Thresholds.value`."""
        return self._histogram().value(k)

    def count_for_mass(self, share: float) -> int:
        """As `Thresholds.count_for_mass`."""
        return self._histogram().count_for_mass(share)

    def kappa(self, density: float) -> float:
        """As `Thresholds.kappa`."""
        return self._histogram().kappa(density)

    def _histogram(self) -> Thresholds:
        if self._whole is None:
            self._whole = self._make_whole()
        return self._whole


# ------------------------------------------------------------------------------------------------ largest values


def largest_values(base: Tensor, own: Sequence[Tensor]) -> list[float]:
    """max |base| and max |own - base| of each; NaN or infinity where one is found.

    Args:
        base: Flat, floating.
        own: Tensors as long as `base`, flat, floating. One that is the base itself gives zero.
    """
    swept = _loaded() if base.numel() >= _CHUNK else None
    tensors = [t if t.data_ptr() != base.data_ptr() else None for t in own]
    if swept is None or not all(_is_plain(t) for t in (base, *own)):
        return [_largest(None, base), *(0.0 if t is None else _largest(base, t) for t in tensors)]
    return [swept.largest(None, base), *(0.0 if t is None else swept.largest(base, t) for t in tensors)]


def _largest(base: Tensor | None, own: Tensor) -> float:
    """max |own - base|, or max |own|."""
    found = [torch.zeros((), device=own.device)]
    for start in range(0, own.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        x = own[part].to(torch.float32)
        found.append((x if base is None else x - base[part].to(torch.float32)).abs().amax())
    return float(torch.stack(found).max())


# ------------------------------------------------------------------------------------------------ thresholds


def cut_of_deltas(base: Tensor, own: Tensor, k: int, largest: float) -> Cut | None:
    """The `OrderStatistics.cut` of the histogram of |own - base|, without the histogram.

    Args:
        base: Flat, finite, on the CPU.
        own: As `base`.
        k: In 1..n - 1.
        largest: max |own - base|.
    Returns:
        The same numbers as the histogram gives; None if the sample's bracket missed (4 standard errors to either side).
    """
    bottom, top = _bracket(base, own, k / base.numel(), largest)
    swept = _loaded() if _is_plain(base) and _is_plain(own) else None
    above, bins = (count if swept is None else swept.count)(base, own, bottom, top)
    reach = above + bins[::-1].cumsum()
    if above >= k or reach[-1] < k:
        return None
    i, share = place_in_bins(reach, k, above)
    return cut_in_bin(_edge(top - 1 - i), _edge(top - i), share)


def count(base: Tensor, own: Tensor, bottom: int, top: int) -> tuple[int, NDArray[np.int64]]:
    """How many |own - base| lie above the bins [bottom, top), and in each of them. Without a compiler."""
    low, high = np.float32(_edge(bottom)), np.float32(_edge(top))
    above, taken = 0, []
    for size in _sizes(base, own):
        over, inside = size >= high, size >= low
        above += int(np.count_nonzero(over))
        taken.append(size[np.logical_xor(inside, over, out=inside)])
    bins = (np.concatenate(taken).view(np.int32) >> BIN_SHIFT) - bottom
    return above, np.bincount(bins, minlength=top - bottom)


def _sizes(base: Tensor, own: Tensor) -> Iterator[NDArray[np.float32]]:
    """|own - base| in chunks that share one buffer. torch converts dtypes fastest, and numpy compares fastest."""
    origin, delta = torch.empty(2, min(_CHUNK, base.numel()), dtype=torch.float32)
    for start in range(0, base.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        n = base[part].numel()
        yield delta[:n].copy_(own[part]).sub_(origin[:n].copy_(base[part])).abs_().numpy()


def _bracket(base: Tensor, own: Tensor, density: float, largest: float) -> tuple[int, int]:
    """Bins [bottom, top) that hold the value which a share `density` exceeds, by a sample spread over the tensor."""
    n = min(max(_SAMPLE, base.numel() // 128), 16 * _SAMPLE) // _RUN * _RUN
    rows = base.numel() // _RUN
    places = _places(n // _RUN, rows)
    mine, origin = (t[: rows * _RUN].view(rows, _RUN)[places].reshape(-1).to(torch.float32) for t in (own, base))
    sample = mine.sub_(origin).abs_().numpy()
    sample[::-1].sort()
    margin = 4 * math.sqrt(n * density * (1 - density)) + 8
    first, last = math.floor(density * n - margin), math.ceil(density * n + margin)
    top = _bin(float(sample[first]) if first >= 0 else largest) + 1
    return (_bin(float(sample[last])) if last < n else 0), top


@functools.lru_cache(maxsize=8)
def _places(n: int, rows: int) -> Tensor:
    """n positions spread over the rows."""
    return (torch.arange(n) * 0x9E3779B1 % 2**32) * rows >> 32


def _bin(value: float) -> int:
    return int(np.float32(value).view(np.int32)) >> BIN_SHIFT


def _edge(number: int) -> float:
    """Smallest float32 of a bin; bins are counted from the one that begins at zero."""
    return float(bin_edges(np.asarray(number + ZERO_BIN)))


# ------------------------------------------------------------------------------------------------ in C

_C = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}  # types of `thresholds.cpp`


def _is_plain(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.is_contiguous() and t.dtype in _C


@functools.cache
def _loaded() -> _Swept | None:
    """The sweeps in C; None where there is no compiler."""
    pairs = [f"PAIR({_C[b]}, {_C[o]}, {_C[b]}_{_C[o]})" for b in _C for o in _C]
    try:
        return _Swept(library("\n".join([read_source("streaming/thresholds.cpp"), *pairs, ""])))
    except CompilerError as error:
        log.info("thresholds are found without a compiler: %s", error)
        return None


class _Swept:
    """`_largest` and `count` in C: contiguous tensors on the CPU, of the dtypes of `_C`."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded

    def largest(self, base: Tensor | None, own: Tensor) -> float:
        sweep = self._loaded[f"largest_{_C[own.dtype if base is None else base.dtype]}_{_C[own.dtype]}"]
        sweep.restype = ctypes.c_uint32
        place = None if base is None else ctypes.c_void_p(base.data_ptr())
        bits = sweep(place, ctypes.c_void_p(own.data_ptr()), ctypes.c_int64(own.numel()))
        return float(np.uint32(bits).view(np.float32))

    def count(self, base: Tensor, own: Tensor, bottom: int, top: int) -> tuple[int, NDArray[np.int64]]:
        sweep = self._loaded[f"count_{_C[base.dtype]}_{_C[own.dtype]}"]
        sweep.restype = ctypes.c_int64
        bins = np.zeros(top - bottom, dtype=np.int64)
        above = sweep(
            ctypes.c_void_p(base.data_ptr()), ctypes.c_void_p(own.data_ptr()), ctypes.c_int64(own.numel()),
            ctypes.c_uint32(bottom << BIN_SHIFT), ctypes.c_uint32(top << BIN_SHIFT), ctypes.c_int32(BIN_SHIFT),
            ctypes.c_void_p(bins.ctypes.data),
        )  # fmt: skip
        return int(above), bins

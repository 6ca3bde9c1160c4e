"""A compiled loop at run time: its call, and the threads that share out a tensor."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from merge_search.engine.codegen.loop_template import PART

__all__ = ["Loop"]


class Loop:
    """A compiled loop.

    Args:
        source: C++ of `merge`.
        loaded: The library that `source` compiles to.
        sums: How many sums the loop makes.
    """

    def __init__(self, source: str, loaded: ctypes.CDLL, sums: int) -> None:
        self.source, self.sums = source, sums
        self._call = loaded.merge
        self._call.restype = None
        self._call.argtypes = [*[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3, ctypes.c_int32, ctypes.c_void_p]

    def __call__(
        self, tensors: Sequence[Tensor], floats: Sequence[float], integers: Sequence[int], index: int
    ) -> Tensor:
        """Run over all elements, in as many threads as torch has.

        Args:
            tensors: Flat, contiguous, equally long, of the dtypes that the loop was made for.
            floats: Numbers that the loop was made for.
            integers: Whole numbers that the loop was made for.
            index: Position of the first element; wraps at 2**32.

        Returns:
            The sums, float64, independent of the number of threads.
        """
        n = tensors[0].numel()
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        f, k = (ctypes.c_float * len(floats))(*floats), (ctypes.c_int32 * len(integers))(*integers)
        parts = -(-n // PART)
        sums = torch.zeros(parts, self.sums, dtype=torch.float64) if self.sums else _NO_SUMS
        place, first = sums.data_ptr(), ctypes.c_int32(index)

        def run(begin: int, end: int) -> None:
            self._call(begin, end, n, pointers, f, k, first, place)

        threads = min(torch.get_num_threads(), parts)
        if threads <= 1:
            run(0, parts)
        else:
            edges = [parts * t // threads for t in range(threads + 1)]
            list(_pool(threads).map(run, edges[:-1], edges[1:]))
        return sums.sum(0)


_NO_SUMS = torch.zeros(1, 0, dtype=torch.float64)
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)  # a forked process has none of its parent's threads
    if key not in _POOLS:
        _POOLS[key] = ThreadPoolExecutor(threads, thread_name_prefix="merge")
    return _POOLS[key]

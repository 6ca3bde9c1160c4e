"""Memory for short-lived tensors, used again as soon as nobody holds it.

Fresh pages are slow: the system finds and clears each page at its first use, which takes longer than a merge takes over
the page.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Buffers"]

_SMALL = 2**20  # bytes: the allocator itself keeps shorter blocks
_LONGER = 4  # a tensor may take pages up to this many times its length


class Buffers:
    """Lends memory and lends it again once every tensor in it is gone. Safe to use from several threads.

    Memory: the most that was in use at one time, where a tensor counts as the pages that it lies in, at most `_LONGER`
    times its length. Pages go back to the system with the last of the buffers and of the tensors in them; free pages of
    another length go back earlier, when new pages are needed.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        """`n_bytes` of uninitialised memory. It is free when neither the array nor a view of it is left."""
        if n_bytes < _SMALL:
            return np.empty(n_bytes, dtype=np.uint8)
        pages = self._pages(n_bytes)
        array = np.frombuffer(pages, dtype=np.uint8, count=n_bytes)
        weakref.finalize(array, self._free.append, pages).atexit = False
        return array

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU."""
        n_bytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(self.take(n_bytes)).view(dtype).reshape(tuple(shape))

    def _pages(self, n_bytes: int) -> mmap.mmap:
        """The shortest free pages that fit, else new pages; free pages are given back for them."""
        with self._lock:
            fitting = [p for p in self._free if n_bytes <= len(p) <= _LONGER * n_bytes]
            if fitting:
                chosen = min(fitting, key=len)
                self._free.remove(chosen)
                return chosen
            dropped = 0
            while self._free and dropped < n_bytes:
                longest = max(self._free, key=len)
                self._free.remove(longest)
                dropped += len(longest)
        return _new_pages(n_bytes)


def _new_pages(n_bytes: int) -> mmap.mmap:
    # Private pages: shared ones are huge only where the system is configured so, and they are slow to allocate.
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and n_bytes >= 2**21:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

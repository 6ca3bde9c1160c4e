"""Memory for tensors that come and go, used again as soon as nobody holds it.

Pages that a process has never touched are the dearest memory there is: the system finds and clears each at its first use,
which takes longer than what a merge does with it.
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

_SMALL = 2**20  # bytes: what is shorter, the allocator keeps by itself
_LONGER = 4  # times as long as a tensor: what may be taken for it


class Buffers:
    """Gives memory, and gives it again once everything that lay in it is gone. Safe to use from several threads.

    Memory: what was in use at one time, a tensor counted as the pages it lies in: at most `_LONGER` times its length. It is
    the system's again with the last of the buffers and of what lies in them; what is free and does not fit, before.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        """`n_bytes` of memory with anything in it; it is free when neither the array nor a view of it is left."""
        if n_bytes < _SMALL:
            return np.empty(n_bytes, dtype=np.uint8)
        pages = self._pages(n_bytes)
        array = np.frombuffer(pages, dtype=np.uint8, count=n_bytes)
        weakref.finalize(array, self._free.append, pages).atexit = False
        return array

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with anything in it."""
        n_bytes = math.prod(shape) * dtype.itemsize
        return torch.from_numpy(self.take(n_bytes)).view(dtype).reshape(tuple(shape))

    def _pages(self, n_bytes: int) -> mmap.mmap:
        """The shortest free pages that are long enough and not much too long, or new ones in place of free ones."""
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
    # Private: pages that processes can share are not huge unless the system's owner says so, and slow to come by.
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and n_bytes >= 2**21:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

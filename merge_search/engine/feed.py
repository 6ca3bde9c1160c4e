"""Tensors of base and experts, read ahead of the merge: a thread per model reads, and hashes what it reads."""

from __future__ import annotations

import contextlib
import mmap
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge_search.engine.checkpoint import DTYPES, Checkpoint, Expert
from merge_search.engine.hashing import HashedReader
from merge_search.engine.pool import ModelPool

__all__ = ["Feed", "Read"]

_KEPT_BYTES = 2**24  # of a buffer: longer ones are few, and too much to hold on to


class Read(NamedTuple):
    """One model's tensor; None where an expert has the base's. `buffer`: the memory it lies in, if that is the feed's."""

    tensor: Tensor | None
    buffer: NDArray[np.uint8] | None = None


class Feed:
    """Reads a pool's tensors, in threads of its own.

    Memory: what was asked for and not given back; buffers that were given back are used again.
    """

    def __init__(self, pool: ModelPool) -> None:
        self._readers = [(source, HashedReader(source.info)) for source in pool.sources]
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="read") for _ in self._readers]
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def ask(self, name: str) -> list[Future[Read]]:
        """The base's tensor and every expert's, soon; asked for in the order of names, files are read once."""
        pairs = zip(self._threads, self._readers, strict=True)
        return [thread.submit(self._read, source, reader, name) for thread, (source, reader) in pairs]

    def _read(self, source: Checkpoint | Expert, reader: HashedReader, name: str) -> Read:
        if not source.changes(name):
            return Read(None)
        if not source.is_stored(name):
            return Read(source.tensor(name))
        t = source.info.tensors[name]
        try:
            buffer = self._free[t.n_bytes].pop()
        except IndexError:
            buffer = _new_buffer(t.n_bytes)
        reader.read(name, buffer.data)
        return Read(torch.from_numpy(buffer).view(DTYPES[t.dtype]).reshape(t.shape), buffer)

    def give_back(self, reads: Sequence[Read]) -> None:
        """Let the memory of tensors that nobody uses any more be used again."""
        for read in reads:
            if read.buffer is not None and len(read.buffer) <= _KEPT_BYTES:
                self._free[len(read.buffer)].append(read.buffer)

    def finish(self) -> None:
        """Read what nobody asked for, so that every model's hash is known.

        Raises:
            WeightsError: a file was changed meanwhile.
        """
        for future in [t.submit(r.finish) for t, (_, r) in zip(self._threads, self._readers, strict=True)]:
            future.result()

    def close(self) -> None:
        """End the threads; what is being read is read to its end, what waits is not."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.shutdown()


def _new_buffer(n_bytes: int) -> NDArray[np.uint8]:
    """Pages of its own: they are the system's again as soon as nobody holds them, whichever thread does so last."""
    pages = mmap.mmap(-1, max(1, n_bytes))
    if hasattr(mmap, "MADV_HUGEPAGE") and n_bytes >= 2**21:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8, count=n_bytes)

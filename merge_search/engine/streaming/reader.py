"""Reads tensors of base and experts ahead of the merge: a thread per model reads its file and hashes it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint, Expert
from merge_search.engine.checkpoints.hashing import HashedReader
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.streaming.buffers import Buffers

__all__ = ["Feed"]


class Feed:
    """Reads a pool's tensors, in threads of its own.

    Args:
        pool: A pool made with ``streaming=True``.
        buffers: Memory for the tensors.
    """

    def __init__(self, pool: ModelPool, buffers: Buffers) -> None:
        self._buffers = buffers
        self._readers = [(source, HashedReader(source.info)) for source in pool.sources]
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="read") for _ in self._readers]

    def ask(self, name: str) -> list[Future[Tensor | None]]:
        """Begin to read the base's tensor and every expert's.

        Files are read once if tensors are asked for in the order of names.

        Returns:
            One future per model. Its result is None for an expert that has the base's tensor.
        """
        pairs = zip(self._threads, self._readers, strict=True)
        return [thread.submit(self._read, source, reader, name) for thread, (source, reader) in pairs]

    def _read(self, source: Checkpoint | Expert, reader: HashedReader, name: str) -> Tensor | None:
        if not source.changes(name):
            return None
        if not source.is_stored(name):
            return source.tensor(name)
        t = source.info.tensors[name]
        buffer = self._buffers.take(t.n_bytes)
        reader.read(name, buffer.data)
        return torch.from_numpy(buffer).view(TORCH_DTYPES[t.dtype]).reshape(t.shape)

    def finish(self) -> None:
        """Read the tensors that nobody asked for, so that every model's hash is known.

        Raises:
            WeightsError: A file was changed meanwhile.
        """
        for future in [t.submit(r.finish) for t, (_, r) in zip(self._threads, self._readers, strict=True)]:
            future.result()

    def close(self) -> None:
        """End the threads. A tensor that is being read is read to its end; waiting ones are dropped."""
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for thread in self._threads:
            thread.shutdown()

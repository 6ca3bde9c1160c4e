"""One hash for weights: the same for a live model, for a folder, and for any way of cutting it into files.

Rule: sha256 over the tensors in the order of their names. Each tensor is ``name|dtype|shape`` in UTF-8 (``BF16``,
``2,3``), then its bytes, little-endian and contiguous. Tensors are hashed, not files, so shards and metadata do not
matter.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterable
from io import RawIOBase
from pathlib import Path
from typing import Any

from merge_search.engine.checkpoints.headers import ADAPTER_CONFIG, CheckpointInfo, TensorHeader, read_checkpoint
from merge_search.errors import WeightsError

__all__ = ["HashInTurn", "HashedReader", "WeightsHash", "hash_checkpoint", "hash_folder", "hash_once", "pieces"]

CHUNK_BYTES = 1 << 18  # small enough to stay in the processor's cache until it is hashed
# Settings of an adapter's config that change the expert it makes.
ADAPTER_KEYS = (
    "alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "modules_to_save", "r", "rank_pattern",
    "target_parameters", "use_dora", "use_rslora",
)  # fmt: skip
_known: dict[tuple[object, ...], str] = {}  # hashes by the state of the files, for as long as the process lives


class WeightsHash:
    """Hash of tensors that are added in the order of their names."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._last = ""

    def add(self, name: str, dtype: str, shape: Iterable[int], data: Iterable[Any]) -> None:
        """Add one tensor. `data` are buffers that follow each other."""
        if name <= self._last:
            raise AssertionError(f"tensors must come sorted by name, got {name!r} after {self._last!r}")
        self._last = name
        self._sha.update(f"{name}|{dtype}|{','.join(map(str, shape))}".encode())
        for buffer in data:
            self._sha.update(buffer)

    def hexdigest(self) -> str:
        """Return the hash of the tensors added so far."""
        return self._sha.hexdigest()


class HashInTurn:
    """Hash of a folder's tensors, some of which pass by in memory. The others are read from the files.

    Args:
        names: Names of all tensors to hash.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._waiting = deque(sorted(names))
        self._result = WeightsHash()

    def is_next(self, name: str) -> bool:
        """Whether this tensor is the next to hash."""
        return bool(self._waiting) and self._waiting[0] == name

    def add(self, name: str, dtype: str, shape: Iterable[int], data: Iterable[Any]) -> None:
        """Add the tensor if it is next. A tensor that is not next is left to `read`."""
        if self.is_next(name):
            self._result.add(self._waiting.popleft(), dtype, shape, data)

    def read(self, info: CheckpointInfo, before: str | None = None) -> None:
        """Read the waiting tensors from the files: all of them, or those whose names come before `before`."""
        while self._waiting and (before is None or self._waiting[0] < before):
            t = info.tensors[self._waiting.popleft()]
            buffer = memoryview(bytearray(min(t.n_bytes, CHUNK_BYTES)))
            self._result.add(t.name, t.dtype, t.shape, pieces(t, buffer))

    def finish(self, info: CheckpointInfo) -> str:
        """Read the waiting tensors from the files and return the hash.

        For an adapter, the settings of its config that change the expert are added as ``|adapter_config``.
        """
        self.read(info)
        if info.is_adapter:
            settings = {k: info.config[k] for k in ADAPTER_KEYS if info.config.get(k)}
            self._result.add("|adapter_config", "", (), [json.dumps(settings, sort_keys=True).encode()])
        return self._result.hexdigest()


class HashedReader:
    """Reads tensors of a checkpoint and hashes their bytes on the way, unless their hash is known. For one thread.

    Tensors asked for in the order of their names are read once. Any other order costs a second read.

    Args:
        info: The checkpoint.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        self._info = info
        self._stamps = _stamps(info)
        self._hash = HashInTurn(() if self._stamps in _known else info.tensors)

    def read(self, name: str, buffer: memoryview) -> None:
        """Fill `buffer`, which has the tensor's length, with its bytes.

        Raises:
            WeightsError: The file was changed or cannot be read.
        """
        t = self._info.tensors[name]
        self._hash.read(self._info, before=name)
        data = pieces(t, buffer)
        if self._hash.is_next(name):
            self._hash.add(name, t.dtype, t.shape, data)
        else:
            deque(data, maxlen=0)

    def finish(self) -> None:
        """Read what was not asked for, so that `hash_once` knows the hash of the tensors that were read.

        Raises:
            WeightsError: A file was changed in the meantime.
        """
        digest = _known.get(self._stamps) or self._hash.finish(self._info)
        if _stamps(self._info) != self._stamps:
            raise WeightsError(f"{self._info.folder}: was changed while it was read; do not change files in use")
        _known[self._stamps] = digest


def hash_folder(folder: str | Path, names: Collection[str] | None = None) -> str:
    """Return the hash of a folder's tensors, or of the tensors `names`.

    Raises:
        WeightsError: The folder is not a valid checkpoint, or lacks one of `names`.
    Cost: one read of the files; sha256 runs at 1 to 2 GB/s.
    """
    return hash_checkpoint(read_checkpoint(folder), names)


def hash_checkpoint(info: CheckpointInfo, names: Collection[str] | None = None) -> str:
    """As `hash_folder`. An adapter's scales are hashed with its factors, under the name ``|adapter_config``."""
    chosen = info.tensors if names is None else names
    if unknown := [n for n in sorted(chosen) if n not in info.tensors]:
        raise WeightsError(f"{info.folder}: has no tensor {unknown[0]!r} to hash")
    return HashInTurn(chosen).finish(info)


def hash_once(info: CheckpointInfo) -> str:
    """As `hash_checkpoint`. The result is kept for as long as the process lives and the files stay unchanged."""
    stamps = _stamps(info)
    if stamps not in _known:
        _known[stamps] = hash_checkpoint(info)
    return _known[stamps]


def _stamps(info: CheckpointInfo) -> tuple[object, ...]:
    files = (*info.files, info.folder / ADAPTER_CONFIG) if info.is_adapter else info.files
    try:
        return tuple((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    except OSError as error:
        raise WeightsError(f"{info.folder}: cannot be read ({error}); do not change files in use") from None


def pieces(t: TensorHeader, buffer: memoryview) -> Iterable[memoryview]:
    """Yield a tensor's bytes in pieces of `CHUNK_BYTES`, through `buffer`.

    Args:
        t: The tensor.
        buffer: Memory that the pieces are views of. If it is as long as the tensor, it holds the whole tensor in the
            end.
    Raises:
        WeightsError: The file was changed or cannot be read.
    """
    try:
        with t.file.open("rb", buffering=0) as f:
            f.seek(t.start)
            done = 0
            while done < t.n_bytes:
                start = done % len(buffer)
                piece = buffer[start : start + min(CHUNK_BYTES, t.n_bytes - done)]
                if not _fill(f, piece):
                    raise WeightsError(
                        f"{t.file}: was cut off while it was read, in tensor {t.name!r}; do not change files in use"
                    )
                yield piece
                done += len(piece)
    except OSError as error:
        raise WeightsError(
            f"{t.file}: tensor {t.name!r} cannot be read ({error}); do not change files in use, or copy the file again"
        ) from None


def _fill(file: RawIOBase, buffer: memoryview) -> bool:
    """Read until the buffer is full. Return False if the file ends before."""
    done = 0
    while done < len(buffer):
        n = file.readinto(buffer[done:])
        if not n:
            return False
        done += n
    return True

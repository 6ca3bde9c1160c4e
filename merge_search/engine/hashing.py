"""One number for weights: the same for a live model, for a folder, and for any way of cutting it into files.

Rule: sha256 over the tensors in the order of their names; each is ``name|dtype|shape`` in UTF-8 (``BF16``, ``2,3``),
then its bytes, little-endian and contiguous. Tensors are hashed, not files: shards and metadata do not matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from merge_search.engine.headers import CheckpointInfo, TensorHeader, read_checkpoint
from merge_search.errors import WeightsError

__all__ = ["WeightsHash", "hash_checkpoint", "hash_folder"]

CHUNK_BYTES = 1 << 18  # read again and again into the same place, which stays in the processor's cache
# What of an adapter's config changes the expert that it makes.
ADAPTER_KEYS = (
    "alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "modules_to_save", "r", "rank_pattern", "use_dora", "use_rslora",
)  # fmt: skip


class WeightsHash:
    """Collects tensors, in the order of their names."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._last = ""

    def add(self, name: str, dtype: str, shape: Iterable[int], data: Iterable[Any]) -> None:
        """Add one tensor; `data` are buffers that follow each other."""
        if name <= self._last:
            raise AssertionError(f"tensors must come sorted by name, got {name!r} after {self._last!r}")
        self._last = name
        self._sha.update(f"{name}|{dtype}|{','.join(map(str, shape))}".encode())
        for buffer in data:
            self._sha.update(buffer)

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def hash_folder(folder: str | Path, names: Collection[str] | None = None) -> str:
    """Hash of a folder's tensors, or of those `names`.

    Cost: one read of the files; sha256 runs at 1 to 2 GB/s.
    """
    return hash_checkpoint(read_checkpoint(folder), names)


def hash_checkpoint(info: CheckpointInfo, names: Collection[str] | None = None) -> str:
    """As `hash_folder`. An adapter's scales are hashed with its factors, under the name ``|adapter_config``."""
    chosen = sorted(info.tensors if names is None else names)
    if unknown := [n for n in chosen if n not in info.tensors]:
        raise WeightsError(f"{info.folder}: has no tensor {unknown[0]!r} to hash")
    result = WeightsHash()
    for name in chosen:
        t = info.tensors[name]
        result.add(name, t.dtype, t.shape, _data(t))
    if info.is_adapter:
        settings = {k: info.config[k] for k in ADAPTER_KEYS if info.config.get(k)}
        result.add("|adapter_config", "", (), [json.dumps(settings, sort_keys=True).encode()])
    return result.hexdigest()


def _data(t: TensorHeader) -> Iterable[memoryview]:
    """A tensor's bytes in pieces; each is valid until the next is asked for."""
    buffer = memoryview(bytearray(min(t.n_bytes, CHUNK_BYTES)))
    with t.file.open("rb", buffering=0) as f:
        f.seek(t.start)
        left = t.n_bytes
        while left > 0:
            n = f.readinto(buffer[:left])
            if not n:
                raise WeightsError(
                    f"{t.file}: was cut off while it was read, in tensor {t.name!r}; do not change files in use"
                )
            left -= n
            yield buffer[:n]

"""Files of statistics: safetensors with a checksum, written whole or not at all, and checked when read."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import dtype_name, raw_bytes
from merge_search.engine.checkpoints.hashing import WeightsHash
from merge_search.errors import WeightsError

__all__ = ["FOLDER", "FolderStatistics", "StatisticFile", "prune", "write"]

FOLDER = "statistics"
"""Folder beside an exported ``recipe.json``: ``statistics/<kind>/<expert>.safetensors``."""
_METADATA, _CHECKSUM = "merge_search", "sha256"


class StatisticFile:
    """Tensors of one file, memory-mapped. The file is checked once, when it is opened.

    Args:
        path: The file.
        needs_checksum: Refuse a file without a checksum. Files that users make have none.
    Raises:
        WeightsError: The file is no safetensors file, is cut off or changed, or holds NaN, infinity or integers.
    """

    def __init__(self, path: Path, *, needs_checksum: bool) -> None:
        self.path = path
        try:
            opened: Any = safe_open(path, framework="pt", device="cpu")
            self._file = opened
            self.names = frozenset(opened.keys())
            checksum = json.loads((opened.metadata() or {}).get(_METADATA, "{}")).get(_CHECKSUM)
        except (SafetensorError, OSError, ValueError, AttributeError) as error:
            raise WeightsError(f"{path}: not a safetensors file: {error}") from None
        tensors = {name: opened.get_tensor(name) for name in self.names}
        if checksum is None and needs_checksum:
            raise WeightsError(f"{path}: has no checksum")
        if checksum is not None and _checksum(tensors) != checksum:
            raise WeightsError(f"{path}: its tensors do not have the checksum that the file gives")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise WeightsError(f"{path}: tensor {name!r} must be floating and finite, found {tensor.dtype}")

    def get(self, name: str) -> Tensor | None:
        """Return the tensor, on the CPU; None if the file has none of that name."""
        return self._file.get_tensor(name) if name in self.names else None


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `path`: to a temporary name, flushed to disk, then renamed. Equal content gives equal bytes.

    Args:
        path: Destination; its folder is created if missing.
        tensors: Statistics by tensor name.
        about: A JSON object that tells readers of the file what it is.
    Raises:
        OSError: The file cannot be written. Nothing is left behind.
    """
    kept = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        # NOTE: safetensors writes several metadata entries in random order, so there is only one.
        text = json.dumps({_CHECKSUM: _checksum(kept), "about": about}, sort_keys=True)
        save_file(kept, temporary, metadata={_METADATA: text})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # raised when the disk is full
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def prune(folder: Path, max_bytes: float, keep: Collection[Path]) -> list[Path]:
    """Remove measured files, the longest unused first, until the rest take at most `max_bytes`.

    Only files named by a key count. Files that users put into `folder` and its sub-folders are left alone.

    Args:
        folder: Folder of the measured files.
        max_bytes: Most bytes on disk.
        keep: Files that are never removed, whatever they take.
    Returns:
        The removed files.
    """
    files = []
    for path in folder.glob("*.safetensors"):
        if re.fullmatch(r"[0-9a-f]{64}", path.stem):
            with contextlib.suppress(FileNotFoundError):  # another process may prune at the same time
                stat = path.stat()
                files.append((stat.st_mtime_ns, path.name, path, stat.st_size))
    total = sum(size for *_, size in files)
    removed = []
    for _, _, path, size in sorted(files):
        if total <= max_bytes:
            break
        if path not in keep:
            path.unlink(missing_ok=True)
            total -= size
            removed.append(path)
    return removed


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    result = WeightsHash()
    for name in sorted(tensors):
        result.add(name, dtype_name(tensors[name].dtype), tensors[name].shape, [raw_bytes(tensors[name])])
    return result.hexdigest()


class FolderStatistics:
    """A `StatisticsSource` over ``<folder>/<kind>/<expert>.safetensors``: tensor name on disk -> scores.

    An export keeps such files beside its recipe. Users put scores made elsewhere there (relevance propagation, any
    attribution).

    Raises:
        WeightsError: By `get`: a file cannot be read, or holds NaN or infinity.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[tuple[str, str], StatisticFile | None] = {}

    def path(self, kind: str, expert: str) -> Path | None:
        """Return the file of a statistic, or None if there is none."""
        if not re.fullmatch(r"[\w+-][\w.@+=,-]*", kind):  # a recipe must not name a path outside the folder
            return None
        path = self.folder / kind / f"{expert}.safetensors"
        return path if path.is_file() else None

    def get(self, kind: str, expert: str, name: str) -> Tensor | None:
        """Return the statistic of a tensor, on the CPU; None where there is no file or it lacks the tensor.

        Raises:
            WeightsError: The file cannot be read, or holds NaN or infinity.
        """
        if (kind, expert) not in self._open:
            path = self.path(kind, expert)
            self._open[kind, expert] = None if path is None else StatisticFile(path, needs_checksum=False)
        file = self._open[kind, expert]
        return None if file is None else file.get(name)

    def asked(self) -> list[tuple[str, str]]:
        """Return (kind, expert) of every file read so far."""
        return [key for key, file in self._open.items() if file is not None]

    def files(self) -> dict[str, str | Path]:
        """Return the files read so far in the form that `export_folder` takes as `extra`."""
        paths = {f"{FOLDER}/{kind}/{expert}.safetensors": self.path(kind, expert) for kind, expert in self.asked()}
        return {name: path for name, path in paths.items() if path is not None}

    def problem(self, kind: str, expert: str) -> str:
        """Return why a statistic is unavailable, '' if it is available."""
        if self.path(kind, expert) is not None:
            return ""
        return f"there is no file {self.folder / kind / (expert + '.safetensors')}"

"""Write a merged model as a Hugging Face folder: either whole or not at all.

Everything is written into a temporary folder beside the destination, flushed to disk and renamed. Tensors are written
straight to their positions in files laid out beforehand, so one tensor at a time is in memory. The files are canonical:
byte for byte those that safetensors writes. Settings and tokenizer are copies of the base's files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import TORCH_DTYPES, dtype_name, raw_bytes
from merge_search.engine.checkpoints.dtypes import DTYPES, RECIPE_NAMES
from merge_search.engine.checkpoints.hashing import CHUNK_BYTES, HashInTurn
from merge_search.engine.checkpoints.headers import (
    CheckpointInfo,
    TensorHeader,
    natural_key,
    read_checkpoint,
    read_json,
)
from merge_search.engine.checkpoints.layout import is_mergeable
from merge_search.engine.kernels.numerics import is_finite
from merge_search.errors import InputError, NonFiniteError, WeightsError
from merge_search.recipe import Recipe

__all__ = ["check_destination", "export_folder", "sync_folder", "whole_folder", "write_file", "write_model"]

SHARD_BYTES = 5 * 10**9
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "*.model",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Files of the base that are copied into the merged model's folder."""
_SAFETENSORS_NAMES = {recipe_name: name for name, recipe_name in RECIPE_NAMES.items()}


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    is_merged: bool = True


def export_folder(
    out: str | Path,
    *,
    base_folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    recipe: Recipe,
    card: str,
    extra: Callable[[], Mapping[str, str | bytes | Path]] | None = None,
    left_out: Collection[str] = (),
    shard_bytes: int = SHARD_BYTES,
    expected: str = "",
) -> str:
    """Write a merged model to `out` and return the sha256 of its tensors (the rule of `hashing`).

    Exactly the base's names are written, each in the base's dtype or, where floating, in `recipe.dtype`.
    ``config.json`` is the base's, with its dtype changed where that of the tensors differs.

    Args:
        out: Must not exist, or be an empty folder.
        base_folder: Folder of the base.
        tensors: Every tensor of the base once, in the base's shape; cast where the dtype differs. Any order works; the
            order of the names is the cheapest.
        recipe: The recipe, written as ``recipe.json``.
        card: Text of README.md.
        extra: Returns more files by name (``maps/x.safetensors`` is in a sub-folder): their text or bytes, or a file to
            copy.
        left_out: Names of the base that are not written: second copies of tied tensors.
        shard_bytes: Most bytes of one file, unless a tensor is larger.
        expected: sha256 that the tensors must have; '' for any.
    Raises:
        InputError: `out` exists and is not empty, or the disk has too little room. Nothing was touched.
        WeightsError: A tensor is missing, unknown, given twice or of another shape, or the hash is not `expected`.
        NonFiniteError: A tensor holds NaN or infinity.
    Determinism: the same tensors give the same bytes. On any failure, Ctrl-C included, the temporary folder is
    removed. After a kill -9 or power loss it is left beside `out` as ``<out>.tmp-<pid>``, and `out` does not exist.
    """
    out = Path(out)
    base = read_checkpoint(base_folder)
    entries = _plan(base, recipe.dtype, left_out)
    with whole_folder(out, sum(e.n_bytes for e in entries)) as temporary:
        written = HashInTurn([e.name for e in entries])
        _write_tensors(temporary, entries, tensors, shard_bytes, written)
        _write_settings(temporary, base, entries)
        texts: dict[str, str | bytes | Path] = {
            "README.md": card,
            "recipe.json": recipe.to_json() + "\n",  # unless `extra` has another
            **(extra() if extra else {}),
        }
        for name, content in texts.items():
            write_file(temporary / name, content)
        digest = written.finish(read_checkpoint(temporary))
        if expected and digest != expected:
            raise WeightsError(
                f"the merged weights must be the scored ones, sha256 {expected[:16]}..., got {digest[:16]}...; "
                "nothing was written. Was the study run on another device or with another version of torch?"
            )
    return digest


@contextmanager
def whole_folder(out: Path, n_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` if the context ends well, flushed to disk, and is removed otherwise.

    Args:
        out: Must not exist, or be an empty folder.
        n_bytes: What is to be written, at least.
    Raises:
        InputError: `out` exists and is not empty, or the disk has too little room. Nothing was touched.
    """
    check_destination(out, n_bytes)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # a leftover of an earlier process with the same id
    try:
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        os.rename(temporary, out)  # refused if `out` has been filled in the meantime
        _sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_model(
    out: Path,
    *,
    like: Path,
    config: Mapping[str, Any],
    headers: Mapping[str, TensorHeader],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model that a transform makes, as a Hugging Face folder. The caller's folder makes it whole or nothing.

    Args:
        out: A new folder.
        like: The folder whose tokenizer and generation files are copied.
        config: config.json.
        headers: Dtype and shape of every tensor by name; nothing else of them is read.
        tensors: Every tensor of `headers` once; cast where the dtype differs. One at a time is in memory.

    Raises:
        WeightsError: A tensor is missing, unknown, given twice or of another shape.
        NonFiniteError: A tensor holds NaN or infinity.
    Determinism: the same tensors give the same bytes.
    """
    out.mkdir(parents=True)
    entries = [_entry(name, t, t.dtype) for name, t in headers.items()]
    _write_tensors(out, entries, tensors, shard_bytes, HashInTurn(()))
    write_file(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    _copy_files(out, like)


def _entry(name: str, t: TensorHeader, dtype: str) -> _Entry:
    return _Entry(name, dtype, t.shape, t.n_elements * DTYPES[dtype].bits // 8, is_mergeable(t))


def _plan(base: CheckpointInfo, dtype: str | None, left_out: Collection[str]) -> list[_Entry]:
    entries = []
    for name, t in base.tensors.items():
        if name not in left_out:
            word = _SAFETENSORS_NAMES[dtype] if dtype is not None and is_mergeable(t) else t.dtype
            entries.append(_entry(name, t, word))
    return entries


def check_destination(out: Path, n_bytes: int = 0) -> None:
    """Raise `InputError` unless `out` is a new or empty folder with room for `n_bytes`. Nothing in it is touched."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: must be a new or empty folder, but it is a file or link; nothing was written")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(
            f"{out}: must be a new or empty folder, but it is not empty; nothing was touched, give another name"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if n_bytes > free:
        raise InputError(
            f"{out}: needs {n_bytes / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free there; nothing was written"
        )


# ---------------------------------------------------------------------------------------------- tensors


def _write_tensors(
    folder: Path, entries: list[_Entry], tensors: Iterable[tuple[str, Tensor]], shard_bytes: int, written: HashInTurn
) -> None:
    shards = _cut(entries, shard_bytes)
    names = _shard_names(len(shards))
    positions: dict[str, tuple[RawIOBase, int, _Entry]] = {}
    files: list[RawIOBase] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            files.append((folder / name).open("wb", buffering=0))
            positions.update(_lay_out(files[-1], shard))
        _fill(positions, tensors, written)
    finally:
        for file in files:
            file.close()
    if len(shards) > 1:
        weight_map = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
        metadata = {"total_size": sum(e.n_bytes for e in entries)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _cut(entries: list[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    """Return shards in natural order of names, each at most `shard_bytes` unless one tensor is larger."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in sorted(entries, key=lambda e: natural_key(e.name)):
        if shards[-1] and size + entry.n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.n_bytes
    return shards


def _shard_names(n: int) -> list[str]:
    return ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def _lay_out(file: RawIOBase, shard: list[_Entry]) -> dict[str, tuple[RawIOBase, int, _Entry]]:
    """Write the header, make room for the data, and return the position of every tensor."""
    # safetensors' canonical order: wide dtypes first, so that data is aligned, then its own rank, then names.

    ranks = list(DTYPES)
    shard = sorted(shard, key=lambda e: (-ranks.index(e.dtype), e.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for e in shard:
        header[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [position, position + e.n_bytes]}
        position += e.n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    deque(_write(file, len(text).to_bytes(8, "little") + text), maxlen=0)
    file.truncate(8 + len(text) + position)
    return {e.name: (file, 8 + len(text) + header[e.name]["data_offsets"][0], e) for e in shard}


def _fill(
    positions: dict[str, tuple[RawIOBase, int, _Entry]], tensors: Iterable[tuple[str, Tensor]], written: HashInTurn
) -> None:
    """Write each tensor to its position. Those that come in the order of names are hashed on the way."""
    left = dict(positions)
    for name, tensor in tensors:
        if name not in left:
            problem = "was given twice" if name in positions else "is not a tensor of the base"
            raise WeightsError(f"export: {name!r} {problem}; nothing was written")
        file, position, entry = left.pop(name)
        if tuple(tensor.shape) != entry.shape:
            raise WeightsError(
                f"export: {name!r} must have shape {list(entry.shape)}, got {list(tensor.shape)}; nothing was written"
            )
        if dtype_name(tensor.dtype) != entry.dtype:
            tensor = tensor.to(TORCH_DTYPES[entry.dtype])
        if entry.is_merged and not is_finite(tensor):
            raise NonFiniteError(
                f"export: {name!r} must be finite, found NaN or infinity as {entry.dtype}; nothing was written"
            )
        file.seek(position)
        data = _write(file, raw_bytes(tensor))
        if written.is_next(name):
            written.add(name, entry.dtype, entry.shape, data)
        else:
            deque(data, maxlen=0)
    if left:
        raise WeightsError(
            f"export: {len(left)} tensors of the base were not given ({', '.join(list(left)[:3])}); nothing was written"
        )


def _write(file: RawIOBase, data: NDArray[np.uint8] | bytes) -> Iterator[memoryview]:
    """Write in pieces, and yield each piece while it is still in the processor's cache."""
    view: memoryview = data.data if isinstance(data, np.ndarray) else memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        piece = view[start : start + CHUNK_BYTES]
        done = 0
        while done < len(piece):
            done += file.write(piece[done:]) or 0
        yield piece


# ---------------------------------------------------------------------------------------------- other files


def _write_settings(folder: Path, base: CheckpointInfo, entries: list[_Entry]) -> None:
    """Copy the base's files. config.json gets the dtype that most of the floating bytes have."""
    size = {word: sum(e.n_bytes for e in entries if e.dtype == word) for word in RECIPE_NAMES}
    largest = max(size, key=lambda word: size[word])
    config = read_json(base.folder / "config.json")
    if size[largest] > 0 and _set_dtype(config, RECIPE_NAMES[largest]):
        write_file(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    else:
        write_file(folder / "config.json", base.folder / "config.json")
    _copy_files(folder, base.folder)


def _copy_files(folder: Path, source: Path) -> None:
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                write_file(folder / file.name, file)


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Set every dtype in a config, nested ones included, to `dtype`. Return whether anything changed.

    transformers loads in the config's dtype, whatever the files hold. A config with another dtype would not give the
    model that was scored. A config without a dtype stays without (the files decide), at any depth.
    """
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value != dtype:
            config[key] = dtype
            changed = True
        elif isinstance(value, dict):
            changed = _set_dtype(value, dtype) or changed
    return changed


def write_file(file: Path, content: str | bytes | Path) -> None:
    """Write a text, bytes or a copy of a file; its folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Only the content is copied. The file gets the user's umask; a cached original may be read-only or a link.

    if isinstance(content, Path):
        with content.open("rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Flush every file below a folder to the disk."""
    for file in folder.iterdir():
        if file.is_dir():
            sync_folder(file)
            continue
        with file.open("rb+") as f:
            os.fsync(f.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

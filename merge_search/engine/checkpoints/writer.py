"""A merged model as a Hugging Face folder: whole or not there at all.

Everything is written into a temporary folder beside the destination, flushed to disk and renamed. Tensors go straight
to their place in files laid out beforehand, so one tensor at a time is in memory. The files are canonical, byte for
byte what safetensors writes; settings and tokenizer are copies of the base's files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import DTYPES, dtype_name, raw_bytes
from merge_search.engine.checkpoints.hashing import CHUNK_BYTES, HashInTurn
from merge_search.engine.checkpoints.headers import DTYPE_BITS, CheckpointInfo, natural_key, read_checkpoint, read_json
from merge_search.engine.checkpoints.layout import is_mergeable
from merge_search.engine.kernels.numerics import is_finite
from merge_search.errors import InputError, NonFiniteError, WeightsError
from merge_search.recipe import Recipe

__all__ = ["check_destination", "export_folder"]

SHARD_BYTES = 5 * 10**9
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "*.model", "chat_template*",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    extra: Callable[[], Mapping[str, str | Path]] | None = None,
    left_out: Collection[str] = (),
    shard_bytes: int = SHARD_BYTES,
    expected: str = "",
) -> str:
    """Write a merged model to `out` and return the sha256 of its tensors (the rule of `hashing`).

    Exactly the base's names are written, each in the base's dtype or, where floating, in `recipe.dtype`.
    ``config.json`` is the base's, with its dtype changed where the tensors' is another.

    Args:
        out: Must not exist, or be an empty folder.
        tensors: Every tensor of the base once, the base's shape; cast where the dtype differs. In any order; that of
            their names is the cheapest.
        card: Text of README.md.
        extra: More files by name (``maps/x.safetensors`` lies in a folder): their text, or a file to copy.
        expected: sha256 that the tensors must have; '' for any.
        left_out: Names of the base that are not written: second copies of tied tensors.
    Raises:
        InputError: `out` exists and is not empty, or the disk has too little room; nothing was touched.
        WeightsError: a tensor is missing, unknown, given twice or of another shape, or the hash is not `expected`.
        NonFiniteError: NaN or infinity in a tensor.
    Determinism: the same tensors give the same bytes. On any failure, Ctrl-C included, the temporary folder is
    removed; after a kill -9 or power loss it is left beside `out` as ``<out>.tmp-<pid>``, and `out` is not there.
    """
    out = Path(out)
    base = read_checkpoint(base_folder)
    entries = _plan(base, recipe.dtype, left_out)
    check_destination(out, sum(e.n_bytes for e in entries))
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process with this id, so nobody's now
    try:
        temporary.mkdir()
        written = HashInTurn([e.name for e in entries])
        _write_tensors(temporary, entries, tensors, shard_bytes, written)
        _write_settings(temporary, base, entries)
        texts: dict[str, str | Path] = {
            "README.md": card,
            "recipe.json": recipe.to_json() + "\n",  # unless `extra` has another
            **(extra() if extra else {}),
        }
        for name, content in texts.items():
            _write_file(temporary / name, content)
        digest = written.finish(read_checkpoint(temporary))
        if expected and digest != expected:
            raise WeightsError(
                f"the merged weights must be the scored ones, sha256 {expected[:16]}..., got {digest[:16]}...; nothing was "
                "written. Was the study run on another device or with another version of torch?"
            )
        _sync(temporary)
        os.rename(temporary, out)  # refused if `out` has been filled in the meantime
        _sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return digest


def _plan(base: CheckpointInfo, dtype: str | None, left_out: Collection[str]) -> list[_Entry]:
    entries = []
    for name, t in base.tensors.items():
        if name not in left_out:
            word = SAFETENSORS_DTYPES[dtype] if dtype is not None and is_mergeable(t) else t.dtype
            entries.append(_Entry(name, word, t.shape, t.n_elements * DTYPE_BITS[word] // 8, is_mergeable(t)))
    return entries


def check_destination(out: Path, n_bytes: int = 0) -> None:
    """Raises `InputError` unless `out` is a new or empty folder with room for `n_bytes`; touches nothing in it."""
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
    places: dict[str, tuple[RawIOBase, int, _Entry]] = {}
    files: list[RawIOBase] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            files.append((folder / name).open("wb", buffering=0))
            places.update(_lay_out(files[-1], shard))
        _fill(places, tensors, written)
    finally:
        for file in files:
            file.close()
    if len(shards) > 1:
        weight_map = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
        metadata = {"total_size": sum(e.n_bytes for e in entries)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        _write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _cut(entries: list[_Entry], shard_bytes: int) -> list[list[_Entry]]:
    """Shards in natural order of names, each at most `shard_bytes` unless one tensor is larger."""
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
    """Write the header and make room for the data; the place of every tensor."""
    # safetensors' canonical order: wide dtypes first (so that data is aligned), its own rank within a width, names.
    ranks = list(DTYPE_BITS)
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
    places: dict[str, tuple[RawIOBase, int, _Entry]], tensors: Iterable[tuple[str, Tensor]], written: HashInTurn
) -> None:
    """Each tensor to its place; those that come in the order of names are hashed on the way."""
    left = dict(places)
    for name, tensor in tensors:
        if name not in left:
            what = "was given twice" if name in places else "is not a tensor of the base"
            raise WeightsError(f"export: {name!r} {what}; nothing was written")
        file, position, entry = left.pop(name)
        if tuple(tensor.shape) != entry.shape:
            raise WeightsError(
                f"export: {name!r} must have shape {list(entry.shape)}, got {list(tensor.shape)}; nothing was written"
            )
        if dtype_name(tensor.dtype) != entry.dtype:
            tensor = tensor.to(DTYPES[entry.dtype])
        if entry.is_merged and not is_finite(tensor):
            raise NonFiniteError(
                f"export: {name!r} must be finite, found NaN or infinity as {entry.dtype}; nothing was written"
            )
        file.seek(position)
        passing = _write(file, raw_bytes(tensor))
        if written.is_next(name):
            written.add(name, entry.dtype, entry.shape, passing)
        else:
            deque(passing, maxlen=0)
    if left:
        raise WeightsError(
            f"export: {len(left)} tensors of the base were not given ({', '.join(list(left)[:3])}); nothing was written"
        )


def _write(file: RawIOBase, data: NDArray[np.uint8] | bytes) -> Iterator[memoryview]:
    """Write in pieces, each handed on while it is still in the processor's cache."""
    view: memoryview = data.data if isinstance(data, np.ndarray) else memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        piece = view[start : start + CHUNK_BYTES]
        done = 0
        while done < len(piece):
            done += file.write(piece[done:]) or 0
        yield piece


# ---------------------------------------------------------------------------------------------- other files


def _write_settings(folder: Path, base: CheckpointInfo, entries: list[_Entry]) -> None:
    """Copies of the base's files; config.json says the dtype that most of the floating tensors have."""
    size = {word: sum(e.n_bytes for e in entries if e.dtype == word) for word in SAFETENSORS_DTYPES.values()}
    largest = max(size, key=lambda word: size[word])
    dtype = next(name for name, word in SAFETENSORS_DTYPES.items() if word == largest)
    config = read_json(base.folder / "config.json")
    if size[largest] > 0 and _set_dtype(config, dtype):
        _write_file(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    else:
        _write_file(folder / "config.json", base.folder / "config.json")
    for pattern in COPIED:
        for file in sorted(base.folder.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                _write_file(folder / file.name, file)


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Make every dtype that a config names, nested ones too, the given one; whether anything changed.

    transformers loads in the config's dtype, whatever the files hold: a config that says another would not give the
    model that was scored. A silent config is left silent (the files decide) at any depth.
    """
    changed = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value != dtype:
            config[key] = dtype
            changed = True
        elif isinstance(value, dict):
            changed = _set_dtype(value, dtype) or changed
    return changed


def _write_file(file: Path, content: str | Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Written anew, not copied with its mode: files get the user's umask, cached originals may be read-only or links.
    if isinstance(content, Path):
        with content.open("rb") as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    else:
        file.write_text(content, encoding="utf-8")


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_dir():
            _sync(file)
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

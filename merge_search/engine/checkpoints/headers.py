"""The contents of a checkpoint, from its headers alone: names, dtypes, shapes, positions. Imports no torch.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, then the tensors back to back. The parser
refuses what the reference implementation refuses (truncation, trailing bytes, overlaps, holes, sizes that do not match
shapes, unknown dtypes), and repeated names as well. Pickles are never opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_search.engine.checkpoints.dtypes import DTYPES
from merge_search.errors import WeightsError

__all__ = [
    "ADAPTER_CONFIG",
    "CheckpointInfo",
    "TensorHeader",
    "natural_key",
    "read_checkpoint",
    "read_header",
    "read_json",
    "resolve_model",
]

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DOWNLOAD = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Position of one tensor: bytes [start, end) of `file`, counted from the start of the file.

    Attributes:
        name: Name of the tensor.
        dtype: safetensors' name of the dtype: ``BF16``, ``F32``, ``I64``, ...
        shape: Its shape.
        file: The file that holds it.
        start: Its first byte.
        end: The byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Number of bytes on disk."""
        return self.end - self.start


@dataclass(frozen=True)
class CheckpointInfo:
    """A folder's tensors by name, in the natural order of their names (``layers.2`` before ``layers.10``).

    Attributes:
        folder: The folder.
        tensors: Headers by name of the tensor.
        config: ``config.json``; for an adapter ``adapter_config.json``.
        is_adapter: Whether it is a LoRA adapter, whose tensors are factors named by module.
    """

    folder: Path
    tensors: Mapping[str, TensorHeader]
    config: Mapping[str, Any] = field(default_factory=dict)
    is_adapter: bool = False

    @property
    def n_bytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(t.n_bytes for t in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold tensors, sorted."""
        return tuple(sorted({t.file for t in self.tensors.values()}))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that compares numbers in names by value.

    Example:
        >>> sorted(["layers.10", "layers.2"], key=natural_key)
        ['layers.2', 'layers.10']
    """
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        WeightsError: The file cannot be read or holds no JSON object; the message names the file.
    """
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise WeightsError(f"{file}: must be JSON, but {error}; download or copy it again") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{file}: must be a JSON object, got {type(data).__name__}")
    return data


# ---------------------------------------------------------------------------------------------- one file


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Return the tensors of one safetensors file, in the order of their data.

    Raises:
        WeightsError: The file is not a whole, valid safetensors file.
    Cost: reads the header only.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            head = f.read(8)
            n = int.from_bytes(head, "little")
            if len(head) == 8 and n <= min(MAX_HEADER_BYTES, size - 8):
                text = f.read(n)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror or error})") from None
    if len(head) < 8:
        raise _damaged(file, f"must begin with an 8-byte header length, got {size} bytes in all")
    if n > MAX_HEADER_BYTES:
        raise _damaged(file, f"must have a header of at most {MAX_HEADER_BYTES} bytes, its first 8 bytes say {n}")
    if n > size - 8:
        raise _damaged(file, f"must hold a header of {n} bytes, but the file has only {size} bytes")
    entries = _parse(file, text)
    tensors = [_tensor(file, name, entry, 8 + n) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda t: (t.start, t.end))
    _check_back_to_back(file, tensors, 8 + n, size)
    return {t.name: t for t in tensors}


def _damaged(file: Path, problem: str) -> WeightsError:
    return WeightsError(f"{file}: {problem}; the file is damaged or incomplete: download or copy it again")


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(x for x in names if names.count(x) > 1)!r} occurs twice")
        return table

    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"the header must be JSON, but {error}") from None
    metadata = entries.get("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(file, "__metadata__ must map text to text")
    return dict(entries)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(file: Path, name: str, entry: Any, data: int) -> TensorHeader:
    if not (isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}):
        raise _damaged(file, f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise _damaged(file, f"tensor {name!r} has an unknown dtype {dtype!r}")
    if not (isinstance(shape, list) and all(map(_is_size, shape))):
        raise _damaged(file, f"tensor {name!r}: the shape must be a list of sizes, got {shape!r}")
    are_two_sizes = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))
    if not (are_two_sizes and offsets[0] <= offsets[1]):
        raise _damaged(file, f"tensor {name!r}: data_offsets must be [begin, end], got {offsets!r}")
    bits = math.prod(shape) * DTYPES[dtype].bits
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(
            file, f"tensor {name!r}: shape {shape} of {dtype} is {bits / 8:g} bytes, its data {offsets[1] - offsets[0]}"
        )
    return TensorHeader(name, dtype, tuple(shape), file, data + offsets[0], data + offsets[1])


def _check_back_to_back(file: Path, tensors: list[TensorHeader], data: int, size: int) -> None:
    position = data
    for t in tensors:
        if t.start != position:
            hole = f"leaves a hole of {t.start - position} bytes"
            problem = "overlaps the tensor before it" if t.start < position else hole
            raise _damaged(file, f"tensor {t.name!r} {problem}")
        position = t.end
    if position > size:
        cut = next(t.name for t in tensors if t.end > size)
        raise _damaged(file, f"must be {position} bytes by its header, got {size}: cut off in tensor {cut!r}")
    if position < size:
        raise _damaged(file, f"must be {position} bytes by its header, got {size}: {size - position} trailing bytes")


# ---------------------------------------------------------------------------------------------- one folder


def read_checkpoint(folder: str | Path) -> CheckpointInfo:
    """Read headers and config of a Hugging Face folder: one file, shards with an index, or a LoRA adapter.

    As in transformers, ``model.safetensors`` takes precedence over an index beside it, which is then a leftover.

    Raises:
        WeightsError: The folder does not exist, holds no safetensors or no config, or a shard is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise WeightsError(f"{folder}: must be the folder of a checkpoint, but it {what}")
    has_weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    if (folder / ADAPTER_CONFIG).is_file():
        if has_weights:
            raise WeightsError(
                f"{folder}: holds a whole model and also {ADAPTER_CONFIG}, so it is unclear which is meant; "
                "move one of them away"
            )
        return _read_adapter(folder)
    if not has_weights:
        raise WeightsError(_no_weights(folder))
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"{folder}: must have a config.json beside its weights, found none; copy it from the original model"
        )
    shards = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder)
    return CheckpointInfo(folder, _join(read_header(s) for s in shards), read_json(folder / "config.json"))


def _join(tables: Iterable[dict[str, TensorHeader]]) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for table in tables:
        for name, t in table.items():
            if name in tensors:
                raise WeightsError(f"tensor {name!r} must be in one file, found in {tensors[name].file} and {t.file}")
            tensors[name] = t
    return {name: tensors[name] for name in sorted(tensors, key=natural_key)}


def _shards(folder: Path) -> list[Path]:
    """Return the files that the index names, each checked to exist and to hold the tensors that the index lists."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())):
        raise WeightsError(f"{folder / INDEX}: must have a weight_map from tensor to file; download or copy it again")
    names = sorted(set(weight_map.values()))
    if outside := [n for n in names if Path(n).name != n]:
        raise WeightsError(f"{folder / INDEX}: must name files of the same folder, got {outside[0]!r}")
    if missing := [n for n in names if not (folder / n).is_file()]:
        raise WeightsError(
            f"{folder}: {len(missing)} of the {len(names)} shards that {INDEX} names are missing "
            f"({', '.join(missing[:3])}); finish the download or copy them again"
        )
    held = {name: read_header(folder / name) for name in names}
    for tensor, file in weight_map.items():
        if tensor not in held[file]:
            raise WeightsError(
                f"{folder}: {INDEX} says that {file} holds {tensor!r}, but it does not; "
                "index and shards are of different saves: download or copy the whole folder again"
            )
    return [folder / n for n in names]


def _read_adapter(folder: Path) -> CheckpointInfo:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise WeightsError(_no_weights(folder, ADAPTER_WEIGHTS))
    return CheckpointInfo(
        folder, _join([read_header(folder / ADAPTER_WEIGHTS)]), read_json(folder / ADAPTER_CONFIG), True
    )


def _no_weights(folder: Path, wanted: str = WEIGHTS) -> str:
    files = [f for f in folder.iterdir() if f.is_file()]
    if dangling := sorted(f.name for f in folder.iterdir() if f.is_symlink() and not f.exists()):
        shown = ", ".join(dangling[:3])
        return f"{folder}: must hold {wanted}, found links that lead nowhere ({shown}); download it again"
    if not files:
        return f"{folder}: must hold {wanted}, but the folder is empty; download or copy it again"
    pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern) if f.name != "training_args.bin")
    if pickles:
        return (
            f"{folder}: must hold {wanted}, found only pickled weights ({', '.join(pickles[:3])}), "
            "which can run any code when opened and are never opened here; convert them where you trust them: "
            f"transformers' AutoModel.from_pretrained({folder.name!r}).save_pretrained(OUT) writes safetensors"
        )
    loose = sorted(f.name for f in folder.glob("*.safetensors"))
    if loose:
        return (
            f"{folder}: must hold {wanted} or {INDEX}, found only {', '.join(loose[:3])}; "
            "the index is missing, or the file has another name"
        )
    return f"{folder}: must hold {wanted}, found no weights among {len(files)} files"


# ---------------------------------------------------------------------------------------------- names


def resolve_model(path_or_id: str | Path) -> Path:
    """Return the folder of a path or hub id (``org/name``). The files of a hub id are downloaded once and cached.

    Only weights, JSON and tokenizer files are fetched, never code or pickles.

    Raises:
        WeightsError: There is no such folder, and the hub has no such repository or cannot be reached.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise WeightsError(f"{path}: must be the folder of a checkpoint, but it is a file")
    if not HUB_ID.fullmatch(str(path_or_id)):
        raise WeightsError(f"{path_or_id}: no such folder; correct the path, or give a hub id (org/name)")
    return _download(str(path_or_id))


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=DOWNLOAD, ignore_patterns=["*/*"]))
    except GatedRepoError:
        reason = "the hub's repository is gated: accept its terms and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such repository (or it is private: log in with `hf auth login`)"
    except LocalEntryNotFoundError:
        reason = "the hub could not be reached and nothing is cached: check the connection, or give a folder"
    except (HfHubHTTPError, OSError) as error:
        reason = f"the hub could not be reached ({type(error).__name__}): check the connection, or give a folder"
    raise WeightsError(f"{repo}: no such folder, and {reason}")

"""Maps: coefficients per output row, which are too many for a recipe, in files named by the hash of their bytes.

A map belongs to one expert. For every merged tensor it holds one float32 number per output row (first axis): one per
element of a 1-D tensor, one for a 0-d tensor. The row's coefficient is the recipe's coefficient times the map's number.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from merge_search.engine.contracts import Tensors, statistic_of
from merge_search.errors import NonFiniteError, RecipeError, WeightsError
from merge_search.recipe import Recipe

__all__ = ["FOLDER", "MapStore", "map_files", "n_rows", "read_map", "rows_of", "write_map"]

FOLDER = "maps"
"""Name of the folder beside a study's storage, and beside an exported ``recipe.json``."""
KEPT_BYTES = 2**28  # bytes of maps that are kept on the device; at least 8 maps are kept whatever they take


def n_rows(shape: Sequence[int]) -> int:
    """Return the number of output rows of a tensor of this shape: its first axis, 1 for a 0-d tensor.

    Example:
        >>> n_rows((3, 5)), n_rows(())
        (3, 1)
    """
    return shape[0] if shape else 1


def write_map(folder: str | Path, tensors: Mapping[str, Tensor]) -> str:
    """Write ``<folder>/<sha256>.safetensors`` and return the hash: equal content, equal bytes, equal name.

    Args:
        folder: Created if missing.
        tensors: Tensor name -> numbers per output row, shape (rows,); stored as float32.
    Raises:
        NonFiniteError: An entry holds NaN or infinity.
        RecipeError: An entry does not have exactly one axis.
    Durability: written to a temporary name, flushed to disk and renamed. An existing file is left alone.
    """
    rows: dict[str, Tensor] = {}
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        if values.ndim != 1:
            raise RecipeError(f"map: entry {name!r} must have shape (rows,), got {tuple(values.shape)}")
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"map: coefficients must be finite, found NaN or infinity for tensor {name!r}")
        rows[name] = values
    data = save(rows)
    digest = hashlib.sha256(data).hexdigest()
    file = Path(folder) / f"{digest}.safetensors"
    if file.is_file() and file.stat().st_size == len(data):
        return digest
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _find(folders: Iterable[str | Path], digest: str) -> Path:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise RecipeError(f"maps: a map is named by 64 hexadecimal digits, got {digest!r}")
    searched = [Path(folder) for folder in folders]
    for folder in searched:
        if (file := folder / f"{digest}.safetensors").is_file():
            return file
    where = ", ".join(map(str, searched)) or "no folder was given"
    raise RecipeError(
        f"maps: no file {digest}.safetensors (looked in: {where}); copy it along from the study's folder {FOLDER!r}, "
        "or from the one beside the recipe.json of an exported model"
    )


def read_map(folders: str | Path | Iterable[str | Path], digest: str) -> dict[str, Tensor]:
    """Read the numbers per output row by tensor name, from the first of `folders` that has the map.

    Returns:
        float32 tensors of shape (rows,), on the CPU.
    Raises:
        RecipeError: No folder has the map.
        WeightsError: The file's hash differs from its name, or its entries are not finite float32 vectors.
    """
    file = _find([folders] if isinstance(folders, str | Path) else folders, digest)
    data = file.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise WeightsError(f"{file}: must have sha256 {digest[:16]}..., found {actual[:16]}...; copy the map again")
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise WeightsError(f"{file}: not a safetensors file: {error}") from None
    for name, values in tensors.items():
        if values.ndim != 1 or values.dtype != torch.float32 or not bool(torch.isfinite(values).all()):
            raise WeightsError(
                f"{file}: entry {name!r} must be finite float32 of shape (rows,), "
                f"got {values.dtype} {tuple(values.shape)}"
            )
    return tensors


def map_files(folders: Iterable[str | Path], recipe: Recipe) -> dict[str, str | Path]:
    """Return the maps of a recipe as `export_folder` takes them in `extra`: ``maps/<sha256>.safetensors`` -> file.

    Raises:
        RecipeError: A map is in none of `folders`.
    """
    searched = list(folders)
    return {f"{FOLDER}/{digest}.safetensors": _find(searched, digest) for digest in sorted(set(recipe.maps.values()))}


def rows_of(tensors: Tensors, recipe: Recipe, expert: str, name: str) -> Tensor | None:
    """Return the numbers of a recipe's map for one expert and tensor: float32, shape (rows,); None if it has no map.

    Raises:
        RecipeError: The map is not available, or has another number of rows.
    """
    if expert not in recipe.maps:
        return None
    numbers = statistic_of(tensors, f"map:{recipe.maps[expert]}", expert, name).to(tensors.device, torch.float32)
    rows = n_rows(tensors.base(name).shape)
    if numbers.numel() != rows:
        raise RecipeError(
            f"maps: the map of expert {expert!r} must have {rows} numbers for tensor {name!r}, found {numbers.numel()}"
        )
    return numbers.reshape(-1)


class MapStore:
    """Maps on a device, checked against the tensors that they belong to. The latest ones are kept.

    Args:
        folders: Folders where files are looked for, in order. The list may grow.
        shapes: Shape of every merged tensor.
        device: Where maps are kept.
    """

    def __init__(self, folders: list[Path], shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        self.folders, self._shapes, self._device = folders, shapes, device
        self._held: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._limit = max(8, KEPT_BYTES // max(1, 4 * sum(n_rows(s) for s in shapes.values())))

    def get(self, digest: str, name: str) -> Tensor:
        """Return the numbers of tensor `name`: float32, shape (rows,).

        Raises:
            RecipeError: No folder has the map, or it was made for other tensors.
            WeightsError: As `read_map`.
        """
        held = self._held.get(digest)
        if held is None:
            held = self._read(digest)
            self._held[digest] = held
            if len(self._held) > self._limit:
                self._held.popitem(last=False)
        self._held.move_to_end(digest)
        return held[name]

    def _read(self, digest: str) -> dict[str, Tensor]:
        tensors = read_map(self.folders, digest)
        problems = [
            f"maps: {digest[:16]}... has no entry for tensor {name!r}" for name in self._shapes if name not in tensors
        ]
        problems += [
            f"maps: {digest[:16]}... must have {n_rows(shape)} numbers for tensor {name!r}, found {len(tensors[name])}"
            for name, shape in self._shapes.items()
            if name in tensors and len(tensors[name]) != n_rows(shape)
        ]
        problems += [f"maps: {digest[:16]}... names an unknown tensor {n!r}" for n in tensors if n not in self._shapes]
        if problems:
            raise RecipeError([*problems[:5], "the map was made for other models"])
        return {name: values.to(self._device) for name, values in tensors.items()}

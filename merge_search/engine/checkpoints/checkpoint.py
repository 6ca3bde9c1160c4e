"""Tensors of checkpoints, opened lazily: whole models, and experts as they stand against a base.

Files are mapped, not read: a tensor costs memory when it is touched, and the system's page cache shares it between
processes. Whoever needs a copy of their own must make it: mapped files must not be overwritten in place.
"""

from __future__ import annotations

from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_search.engine.checkpoints.adapter import AdapterEntry, plan_adapter
from merge_search.engine.checkpoints.adapter_parameters import Wrapped, parameter_delta
from merge_search.engine.checkpoints.headers import CheckpointInfo, read_checkpoint
from merge_search.engine.checkpoints.layout import is_mergeable, name_groups
from merge_search.engine.checkpoints.vocabulary import (
    RowMap,
    Vocabulary,
    compare,
    is_vocabulary_tensor,
    read_vocabulary,
    row_map,
)
from merge_search.errors import WeightsError
from merge_search.recipe import Group

__all__ = ["DTYPES", "Checkpoint", "Expert", "dtype_name", "raw_bytes", "tied_aliases"]

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32,
    "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_KEPT_DELTAS = 2  # of stacked experts, each shared by many tensors: a block's two stacks lie side by side in a file
_READ_BYTES = 2**26  # a system call reads less than 2 GiB
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' word for a dtype: ``BF16``."""
    return NAMES[dtype]


def raw_bytes(tensor: Tensor) -> Any:
    """Buffer over a tensor's bytes, contiguous and on the CPU; no value is cast."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


class Checkpoint:
    """A folder's tensors by name, on the CPU, mapped from its files; read only.

    Raises:
        WeightsError: the folder is not a whole, valid checkpoint; raised at once, from the headers.
    """

    def __init__(self, folder: str | Path) -> None:
        self.info: CheckpointInfo = read_checkpoint(folder)
        self._files: dict[Path, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """One tensor, as on disk. Do not write into it."""
        t = self.info.tensors.get(name)
        if t is None:
            raise WeightsError(f"{self.info.folder}: has no tensor {name!r}")
        try:
            if t.file not in self._files:
                self._files[t.file] = safe_open(str(t.file), framework="pt", device="cpu")
            tensor: Tensor = self._files[t.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{t.file}: tensor {name!r} cannot be read ({error}); download or copy the file again"
            ) from None
        return tensor

    def changes(self, name: str) -> bool:
        """Whether it has this tensor."""
        return name in self.info.tensors

    def is_stored(self, name: str) -> bool:
        """As `changes`: files hold what there is."""
        return name in self.info.tensors

    def read(self, name: str) -> Tensor:
        """One tensor, read into memory of its own: its pages are freed with it, and it may be written into."""
        t = self.info.tensors.get(name)
        if t is None:
            raise WeightsError(f"{self.info.folder}: has no tensor {name!r}")
        data = torch.from_numpy(
            np.empty(t.n_bytes, dtype=np.uint8)
        )  # in huge pages, where torch takes small ones: half the time
        try:
            with t.file.open("rb", buffering=0) as f:
                f.seek(t.start)
                _fill(f, data.numpy().data)
        except (EOFError, OSError) as error:
            raise WeightsError(
                f"{t.file}: tensor {name!r} cannot be read ({error}); do not change files in use, or copy the file again"
            ) from None
        return data.view(DTYPES[t.dtype]).reshape(t.shape)


def _fill(file: RawIOBase, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        n = file.readinto(buffer[done : done + _READ_BYTES])
        if not n:
            raise EOFError(f"the file ends after {done} of its {len(buffer)} bytes")
        done += n


class Expert:
    """An expert as it stands against a base: `tensor(name)` has the base's name and shape for every mergeable tensor.

    A LoRA adapter is never made dense on disk; its tensors are computed one by one, with peft's rule bit for bit
    (`merge_and_unload` with its defaults, on the CPU). Rows of tokens that the expert lacks are the base's, rows of
    tokens that the base lacks are left out; `notes` says so.

    Determinism: adapters multiply two float32 matrices on the CPU; another processor may round the last bit otherwise.
    """

    def __init__(self, base: Checkpoint, folder: str | Path, *, name: str = "") -> None:
        self.base, self.name = base, name
        self.checkpoint = Checkpoint(folder)
        self.info = self.checkpoint.info
        self.notes: list[str] = []
        self._rows: dict[str, RowMap] = {}
        self._adapter: dict[str, AdapterEntry] = {}
        self._deltas: dict[str, Tensor] = {}
        if self.info.is_adapter:
            self._adapter, problems = plan_adapter(base.info, self.info)
            if problems:
                raise WeightsError(f"{self.info.folder}: " + "; ".join(problems))
        else:
            self._match_rows()

    def changes(self, name: str) -> bool:
        """Whether the expert has a tensor of its own here; an adapter shares all others with the base."""
        return not self.info.is_adapter or name in self._adapter

    def tensor(self, name: str) -> Tensor:
        """The expert's tensor for the base's `name`: the base's shape, on the CPU. Do not write into it."""
        if self.info.is_adapter:
            entry = self._adapter.get(name)
            return self.base.tensor(name) if entry is None else self._adapted(name, entry)
        rows = self._rows.get(name)
        return self.checkpoint.tensor(name) if rows is None else self._with_rows(name, rows)

    def is_stored(self, name: str) -> bool:
        """Whether the files hold the tensor as it stands against the base."""
        return not self.info.is_adapter and name not in self._rows

    def read(self, name: str) -> Tensor:
        """As `tensor`, in memory of its own wherever the files hold it as it is."""
        return self.checkpoint.read(name) if self.is_stored(name) else self.tensor(name)

    def _match_rows(self) -> None:
        ours, theirs = read_vocabulary(self.base.info.folder), read_vocabulary(self.info.folder)
        if ours is None or theirs is None:
            return
        if mismatch := compare(ours, theirs):
            raise WeightsError(
                f"{self.info.folder}: its vocabulary must be the base's, apart from added tokens, but {mismatch}"
            )
        for name, group in name_groups(self.base.info.tensors).items():
            if name in self.info.tensors and is_vocabulary_tensor(self.base.info, group):
                self._match(name, ours, theirs)

    def _match(self, name: str, ours: Vocabulary, theirs: Vocabulary) -> None:
        n_base, n_expert = self.base.info.tensors[name].shape[0], self.info.tensors[name].shape[0]
        rows = row_map(ours, theirs, n_base, n_expert)
        if rows is None:
            return
        self._rows[name] = rows
        self.notes.append(
            f"expert {self.name!r}, tensor {name!r}: {len(rows.base)} of {n_base} rows are matched by token; "
            f"{rows.n_extra} tokens that only the expert has are left out"
        )

    def _with_rows(self, name: str, rows: RowMap) -> Tensor:
        base, own = self.base.tensor(name), self.checkpoint.tensor(name)
        if base.shape[1:] != own.shape[1:]:
            raise WeightsError(
                f"{self.info.folder}: tensor {name!r} must have rows of {list(base.shape[1:])}, got {list(own.shape[1:])}"
            )
        # The wider dtype of the two, so that rows kept from the base have a delta of exactly zero.
        result = base.to(torch.promote_types(base.dtype, own.dtype), copy=True)
        result[torch.tensor(rows.base, dtype=torch.long)] = own[torch.tensor(rows.expert, dtype=torch.long)].to(
            result.dtype
        )
        return result

    def _adapted(self, name: str, entry: AdapterEntry) -> Tensor:
        base = self.base.tensor(name)
        if entry.whole:
            whole = self.checkpoint.tensor(entry.whole)
            base = (whole if entry.part is None else entry.part.of(whole)).to(base.dtype)
        if not entry.a:
            return base
        if entry.wrapped is not None:
            delta = self._parameter_delta(entry, entry.wrapped, base.dtype)
            return base + (delta if entry.part is None else entry.part.of(delta))
        magnitude = self.checkpoint.tensor(entry.magnitude) if entry.magnitude else None
        return lora_weight(base, self.checkpoint.tensor(entry.a), self.checkpoint.tensor(entry.b), entry, magnitude)

    def _parameter_delta(self, entry: AdapterEntry, wrapped: Wrapped, dtype: torch.dtype) -> Tensor:
        """What is added to a parameter, rounded to its dtype first, as peft does; the last ones are kept: tensors share them."""
        found = self._deltas.pop(entry.a, None)
        if found is None:
            a, b = self.checkpoint.tensor(entry.a), self.checkpoint.tensor(entry.b)
            found = parameter_delta(a, b, wrapped, entry.scale).to(dtype)
        if entry.part is not None:
            self._deltas = {**dict(list(self._deltas.items())[1 - _KEPT_DELTAS :]), entry.a: found}
        return found


def lora_weight(base: Tensor, a: Tensor, b: Tensor, entry: AdapterEntry, magnitude: Tensor | None = None) -> Tensor:
    """W + scale * B @ A, or DoRA's m * (W + scale * B @ A) / norm, rounded once to the dtype of W.

    The product and the sum are float32, as in peft with ``autocast_adapter_dtype`` and without ``safe_merge``; for
    embeddings the product is rounded to W's dtype before it is added.

    Args:
        base: W, shape (out, in), or (in, out) where `entry.transpose`; read only.
        a: Shape (r, in).
        b: Shape (out, r).
        magnitude: DoRA's m, one per output of a linear layer, per column of an embedding.
    """
    delta = b.float() @ a.float()
    if entry.transpose:
        delta = delta.T
    delta = delta * entry.scale
    if magnitude is None:
        return base.clone().add_(delta.to(base.dtype) if entry.is_embedding else delta)
    adapted = base + delta
    norm = torch.linalg.norm(adapted.T if entry.transpose else adapted, dim=1)
    factor = (magnitude.reshape(-1).float() / norm).reshape((1, -1) if entry.transpose else (-1, 1))
    result: Tensor = factor * adapted
    return result.to(base.dtype)


def tied_aliases(checkpoint: Checkpoint) -> dict[str, str]:
    """Embeddings or heads that a checkpoint stores twice although they are one tensor: alias -> the name that is kept.

    Such a pair is one parameter of the live model: merged once, and written once. Equal bytes make a pair of two
    embeddings, and of embedding and head unless the config says that they are not tied.
    """
    info = checkpoint.info
    groups = name_groups(info.tensors)
    is_tied = info.config.get("tie_word_embeddings", True) is not False
    kept: list[Group] = []
    aliases: dict[str, str] = {}
    candidates = [g for g in groups.values() if is_vocabulary_tensor(info, g) and is_mergeable(info.tensors[g.tensor])]
    for group in sorted(candidates, key=lambda g: g.kind):  # embeddings before heads; sorting is stable
        twins = (
            o.tensor
            for o in kept
            if (is_tied or group.kind == o.kind) and _are_equal(checkpoint, group.tensor, o.tensor)
        )
        twin = next(twins, None)
        if twin is None:
            kept.append(group)
        else:
            aliases[group.tensor] = twin
    return aliases


def _are_equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    x, y = checkpoint.info.tensors[a], checkpoint.info.tensors[b]
    return (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(checkpoint.tensor(a), checkpoint.tensor(b))

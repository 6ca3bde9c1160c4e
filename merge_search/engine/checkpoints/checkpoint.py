"""Tensors of checkpoints, opened lazily: whole models, and experts seen against a base.

Files are memory-mapped. A tensor takes memory when it is touched, and the system's page cache shares it between
processes. Callers that need a copy must make one. Mapped files must not be overwritten in place.
"""

from __future__ import annotations

from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_search.engine.checkpoints.adapter import AdapterEntry, factors_problem, plan_adapter
from merge_search.engine.checkpoints.adapter_parameters import Wrapped, parameter_delta
from merge_search.engine.checkpoints.dtypes import DTYPES
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
from merge_search.engine.contracts import Factors
from merge_search.errors import WeightsError
from merge_search.recipe import Group

__all__ = ["TORCH_DTYPES", "Checkpoint", "Expert", "dtype_name", "raw_bytes", "tied_aliases"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, d.torch_name) for name, d in DTYPES.items() if d.torch_name
}
"""Dtypes that torch has, by their names in safetensors headers."""
_KEPT_DELTAS = 2  # deltas of stacked experts that are kept: a block has two stacks, and their tensors alternate on disk
_READ_BYTES = 2**26  # bytes per system call, which cannot read 2 GiB or more
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype: ``BF16``."""
    return _NAMES[dtype]


def raw_bytes(tensor: Tensor) -> Any:
    """Return a buffer over a tensor's bytes, contiguous and on the CPU. No value is cast."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


class Checkpoint:
    """A folder's tensors by name, on the CPU, mapped from its files; read only.

    Args:
        folder: Folder of the checkpoint.
    Attributes:
        info: The folder's headers and config.
    Raises:
        WeightsError: The folder is not a whole, valid checkpoint. Raised on construction, from the headers.
    """

    def __init__(self, folder: str | Path) -> None:
        self.info: CheckpointInfo = read_checkpoint(folder)
        self._files: dict[Path, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """Return one tensor as on disk. Do not write into it.

        Raises:
            WeightsError: There is no such tensor, or it cannot be read.
        """
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
        """Whether the checkpoint has this tensor."""
        return name in self.info.tensors

    def is_stored(self, name: str) -> bool:
        """Whether the files hold this tensor; the same as `changes`."""
        return name in self.info.tensors

    def read(self, name: str) -> Tensor:
        """Read one tensor into new memory, which is freed with it and may be written into.

        Raises:
            WeightsError: There is no such tensor, or it cannot be read.
        """
        t = self.info.tensors.get(name)
        if t is None:
            raise WeightsError(f"{self.info.folder}: has no tensor {name!r}")
        # NumPy allocates in huge pages and torch in small ones: this takes half the time.
        data = torch.from_numpy(np.empty(t.n_bytes, dtype=np.uint8))
        try:
            with t.file.open("rb", buffering=0) as f:
                f.seek(t.start)
                _fill(f, data.numpy().data)
        except (EOFError, OSError) as error:
            raise WeightsError(
                f"{t.file}: tensor {name!r} cannot be read ({error}); "
                "do not change files in use, or copy the file again"
            ) from None
        return data.view(TORCH_DTYPES[t.dtype]).reshape(t.shape)


def _fill(file: RawIOBase, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        n = file.readinto(buffer[done : done + _READ_BYTES])
        if not n:
            raise EOFError(f"the file ends after {done} of its {len(buffer)} bytes")
        done += n


class Expert:
    """An expert seen against a base: `tensor(name)` has the base's name and shape for every mergeable tensor.

    A LoRA adapter is never made dense on disk. Its tensors are computed one by one with peft's rule, bit for bit
    (`merge_and_unload` with its defaults, on the CPU). Rows of tokens that the expert lacks are the base's; rows of
    tokens that the base lacks are left out.

    Args:
        base: The base.
        folder: Folder of the expert.
        name: Name of the expert, for `notes`.
    Attributes:
        notes: Which rows were matched by token and which were left out.
    Raises:
        WeightsError: The expert is not a valid checkpoint, or its adapter or vocabulary does not fit the base.
    Determinism: adapters multiply two float32 matrices on the CPU. Another processor may round the last bit
    differently.
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
        """Whether the expert has a tensor of its own here. An adapter shares all other tensors with the base."""
        return not self.info.is_adapter or name in self._adapter

    def tensor(self, name: str) -> Tensor:
        """Return the expert's tensor for the base's `name`: the base's shape, on the CPU. Do not write into it."""
        if self.info.is_adapter:
            entry = self._adapter.get(name)
            return self.base.tensor(name) if entry is None else self._adapted(name, entry)
        rows = self._rows.get(name)
        return self.checkpoint.tensor(name) if rows is None else self._with_rows(name, rows)

    def factors(self, name: str) -> Factors | None:
        """Return the LoRA pair whose product is all that the adapter changes of the base's `name`; None for no pair.

        The scale is in B. An embedding that is saved whole beside its factors has a pair only if it is the base's.
        """
        entry = self._adapter.get(name)
        if entry is None or not entry.a or entry.magnitude or entry.wrapped is not None:
            return None
        if entry.whole and not torch.equal(self.checkpoint.tensor(entry.whole), self.base.tensor(name)):
            return None
        b, a = self.checkpoint.tensor(entry.b).float() * entry.scale, self.checkpoint.tensor(entry.a).float()
        return Factors(b, a, entry.transpose)

    def adapted_module(self, name: str) -> tuple[str, bool] | None:
        """Return the module whose factors change the tensor, and whether it is an embedding; None where none does."""
        entry = self._adapter.get(name)
        return (entry.module, entry.is_embedding) if entry is not None and entry.a else None

    @property
    def factors_problem(self) -> str:
        """Why the expert cannot be merged as LoRA pairs, '' if it can."""
        return factors_problem(self.base.info, self.info)

    def is_stored(self, name: str) -> bool:
        """Whether the files hold the tensor exactly as `tensor` returns it."""
        return not self.info.is_adapter and name not in self._rows

    def read(self, name: str) -> Tensor:
        """As `tensor`, but in new memory where the files hold the tensor as it is."""
        return self.checkpoint.read(name) if self.is_stored(name) else self.tensor(name)

    def _match_rows(self) -> None:
        base, expert = read_vocabulary(self.base.info.folder), read_vocabulary(self.info.folder)
        if base is None or expert is None:
            return
        if mismatch := compare(base, expert):
            raise WeightsError(
                f"{self.info.folder}: its vocabulary must be the base's, apart from added tokens, but {mismatch}"
            )
        for name, group in name_groups(self.base.info.tensors).items():
            if name in self.info.tensors and is_vocabulary_tensor(self.base.info, group):
                self._match(name, base, expert)

    def _match(self, name: str, base: Vocabulary, expert: Vocabulary) -> None:
        n_base, n_expert = self.base.info.tensors[name].shape[0], self.info.tensors[name].shape[0]
        rows = row_map(base, expert, n_base, n_expert)
        if rows is None:
            return
        self._rows[name] = rows
        self.notes.append(
            f"expert {self.name!r}, tensor {name!r}: {len(rows.base)} of {n_base} rows are matched by token; "
            f"{rows.n_extra} tokens that only the expert has are left out"
        )

    def _with_rows(self, name: str, rows: RowMap) -> Tensor:
        base, expert = self.base.tensor(name), self.checkpoint.tensor(name)
        if base.shape[1:] != expert.shape[1:]:
            raise WeightsError(
                f"{self.info.folder}: tensor {name!r} must have rows of {list(base.shape[1:])}, "
                f"got {list(expert.shape[1:])}"
            )
        # The wider of the two dtypes, so that rows taken from the base have a delta of exactly zero.
        result = base.to(torch.promote_types(base.dtype, expert.dtype), copy=True)
        matched = expert[torch.tensor(rows.expert, dtype=torch.long)]
        result[torch.tensor(rows.base, dtype=torch.long)] = matched.to(result.dtype)
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
        """Return what is added to a parameter, rounded to its dtype first, as peft does.

        The last results are kept, because several tensors share them.
        """
        delta = self._deltas.pop(entry.a, None)
        if delta is None:
            a, b = self.checkpoint.tensor(entry.a), self.checkpoint.tensor(entry.b)
            delta = parameter_delta(a, b, wrapped, entry.scale).to(dtype)
        if entry.part is not None:
            latest = list(self._deltas.items())[1 - _KEPT_DELTAS :]
            self._deltas = {**dict(latest), entry.a: delta}
        return delta


def lora_weight(base: Tensor, a: Tensor, b: Tensor, entry: AdapterEntry, magnitude: Tensor | None = None) -> Tensor:
    """Return W + scale * B @ A, or DoRA's m * (W + scale * B @ A) / norm, rounded once to the dtype of W.

    The product and the sum are float32, as in peft with ``autocast_adapter_dtype`` and without ``safe_merge``. For
    embeddings the product is rounded to W's dtype before it is added.

    Args:
        base: W, shape (out, in), or (in, out) if `entry.transpose`; read only.
        a: Shape (r, in).
        b: Shape (out, r).
        entry: Scale and orientation.
        magnitude: DoRA's m: one number per output of a linear layer, or per column of an embedding.
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
    """Return the embeddings and heads that a checkpoint stores twice: alias -> the name that is kept.

    Such a pair is one parameter of the live model, and is merged and written once. Equal bytes make a pair of two
    embeddings. They make a pair of an embedding and a head unless the config says that these are not tied.
    """
    info = checkpoint.info
    groups = name_groups(info.tensors)
    is_tied = info.config.get("tie_word_embeddings", True) is not False
    kept: list[Group] = []
    aliases: dict[str, str] = {}
    candidates = [g for g in groups.values() if is_vocabulary_tensor(info, g) and is_mergeable(info.tensors[g.tensor])]
    for group in sorted(candidates, key=lambda g: g.kind):  # embeddings before heads; sorting is stable
        may_be_one = [other.tensor for other in kept if is_tied or group.kind == other.kind]
        twin = next((name for name in may_be_one if _are_equal(checkpoint, group.tensor, name)), None)
        if twin is None:
            kept.append(group)
        else:
            aliases[group.tensor] = twin

    return aliases


def _are_equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    x, y = checkpoint.info.tensors[a], checkpoint.info.tensors[b]
    return (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(checkpoint.tensor(a), checkpoint.tensor(b))

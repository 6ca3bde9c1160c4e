"""Base and experts, resident: a candidate never reads a file.

Three placements, the first that fits: ``resident`` (on the device), ``pinned`` (in page-locked host memory), ``mapped``
(from the files, through the system's page cache). What is not resident comes to a GPU tensor by tensor, the next one's
copies beside the merge of the one before (`transfer`). `ModelPool.plan` says which and why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import Checkpoint, Expert, tied_aliases
from merge_search.engine.checkpoints.compatibility import check_models
from merge_search.engine.checkpoints.finite import file_problems, refuse, tensor_problem
from merge_search.engine.checkpoints.hashing import hash_once
from merge_search.engine.checkpoints.headers import CheckpointInfo, resolve_model
from merge_search.engine.checkpoints.layout import layout
from merge_search.engine.contracts import Tensors
from merge_search.engine.resident.coefficient_maps import MapStore
from merge_search.engine.resident.transfers import Transfers
from merge_search.errors import WeightsError
from merge_search.memory import free_bytes
from merge_search.recipe import Group, Models

__all__ = ["ModelPool", "StatisticsSource"]

GIB = 2**30
MARGIN = 0.9  # of what is free: allocators and neighbours need the rest
SCRATCH_TENSORS = 6  # float32 temporaries of the largest tensor while it is merged
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
ONCE = "streamed from files: each tensor is used once, and read when its turn comes"
_log = logging.getLogger(__name__)


class StatisticsSource(Protocol):
    """Numbers measured on data."""

    def get(self, kind: str, expert: str, name: str) -> Tensor | None:
        """The statistic `kind` of `expert` for tensor `name`, broadcastable to it; None where it was never measured."""
        ...

    def problem(self, kind: str, expert: str) -> str:
        """Why the statistic cannot be had, '' if it can. Reads no weights."""
        ...


class ModelPool(Tensors):
    """Tensors of one base and its experts on one device.

    Args:
        models: Base and experts, by folder or hub id. Where `models.hashes` are given they are checked.
        device: ``auto`` (a GPU if there is one), or torch's word for a device.
        memory: GiB that the pool may take on its device; None: what is free, less what one live model needs.
        map_folders: Where the maps of recipes are looked for.
        once: Each tensor will be used once: nothing is held but what `holding` names. For one merge from files to files.
            Finiteness is checked in the files, if they fit in free memory together; else it is left to whoever reads the
            tensors.

    Attributes:
        groups: Group of every tensor that is merged, in the order of the checkpoint; a tensor stored twice
            because it is tied counts once.
        copied_names: Tensors that are not merged (integers, masks): the base's, as they are.
        aliases: Tied tensors that the base stores twice: the name left out -> the name that is merged.
        plan: Where the tensors lie and why, with figures.
        notes: What was left out or matched by token.
        map_folders: As given; may grow.
        statistics: Asked by `statistic` for all but maps; None: nothing was measured.

    Raises:
        WeightsError: with every problem that headers show; or for NaN or infinity in a tensor, an expert
            that equals the base, or a hash that is not the one given.
    Determinism: tensors are bits of the files (adapters: see `checkpoint.Expert`), whatever the placement.
    """

    def __init__(
        self,
        models: Models,
        *,
        device: str | torch.device = "auto",
        memory: float | None = None,
        map_folders: Iterable[str | Path] = (),
        once: bool = False,
    ) -> None:
        problems = check_models(models.base, models.experts)
        if problems:
            raise WeightsError("these models cannot be merged:\n" + "\n".join(f"  - {p}" for p in problems))
        self.models = models
        self.device = _device(device)
        self._base = Checkpoint(resolve_model(models.base))
        self._experts = {n: Expert(self._base, resolve_model(f), name=n) for n, f in models.experts.items()}
        self.aliases = tied_aliases(self._base)
        self.groups: dict[str, Group] = {n: g for n, g in layout(self._base.info).items() if n not in self.aliases}
        self.copied_names = tuple(n for n in self._base.info.tensors if n not in self.groups and n not in self.aliases)
        self.notes = [note for e in self._experts.values() for note in e.notes]
        self.map_folders = [Path(folder) for folder in map_folders]
        self._maps = MapStore(self.map_folders, {n: self._base.info.tensors[n].shape for n in self.groups}, self.device)
        self.statistics: StatisticsSource | None = None
        self.check_hashes()
        self.placement, self.plan = ("mapped", ONCE) if once else self._choose(memory)
        _log.info("%s", self.plan)
        self._held: dict[str, list[Tensor]] = {}
        moves = self.device.type == "cuda" and not once and self.placement != "resident"
        self._transfers = Transfers(self._in_host_memory, self.device) if moves else None
        if once:
            self._require_finite_files()
            self._require_differences()
        else:
            self._load()

    @property
    def base_folder(self) -> Path:
        return self._base.info.folder

    @property
    def base_info(self) -> CheckpointInfo:
        return self._base.info

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's, from the base's headers."""
        return self._base.info.tensors[name].shape

    def base(self, name: str) -> Tensor:
        """The base's tensor on the device, in its own dtype. Do not write into it."""
        return self._get(name, 0, self._base.tensor)

    def expert(self, expert: str, name: str) -> Tensor:
        """An expert's tensor on the device: the base's shape, its own dtype. Do not write into it."""
        return self._get(name, 1 + self._index(expert), self._experts[expert].tensor)

    def expect(self, names: Sequence[str]) -> None:
        """In which order tensors will be asked for, so that those in host memory come to the GPU ahead; empty: in none."""
        if self._transfers is not None:
            self._transfers.expect(names)

    @property
    def sources(self) -> tuple[Checkpoint, *tuple[Expert, ...]]:
        """Where tensors come from: the base's files and the experts'."""
        return self._base, *self._experts.values()

    @contextmanager
    def holding(self, name: str, tensors: Sequence[Tensor] = ()) -> Iterator[None]:
        """Have one tensor of base and experts in memory for as long as the context lasts.

        Args:
            tensors: The base's and every expert's, if they were read before; else they are read now.
        """
        if name in self._held:
            yield
            return
        own = list(tensors) or self.read(name, tuple(self._experts))
        moved = {id(t): t.to(self.device) for t in own}  # what experts share with the base stays one
        self._held[name] = [moved[id(t)] for t in own]
        try:
            yield
        finally:
            del self._held[name]

    def read(self, name: str, experts: Sequence[str]) -> list[Tensor]:
        """The base's tensor and those of `experts`, on the device; read anew unless they are held."""
        held = self._held.get(name)
        if self._transfers is not None:
            held = self._transfers.get(name)
        if held is not None:
            return [held[i].to(self.device) for i in (0, *(1 + self._index(e) for e in experts))]
        base = self._base.read(name).to(self.device)
        sources = [self._experts[e] for e in experts]
        return [base, *(s.read(name).to(self.device) if s.changes(name) else base for s in sources)]

    def require_finite(self, name: str) -> None:
        """Raises `WeightsError` naming the file if a tensor of the base or of an expert is not finite."""
        tensors = self.read(name, tuple(self._experts))
        found = [tensor_problem(t, name, *origin) for t, origin in zip(tensors, self._named_sources, strict=True)]
        refuse([p for p in found if p])

    def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
        """``map:<sha256>``: a recipe's map, shape (rows,), on the device; else what `statistics` says.

        Raises:
            RecipeError, WeightsError: the map is missing, changed or made for other models.
        """
        if kind.startswith("map:"):
            return self._maps.get(kind.removeprefix("map:"), name)
        return None if self.statistics is None else self.statistics.get(kind, expert, name)

    @property
    def has_statistics(self) -> bool:
        """Whether statistics were measured, or can be."""
        return self.statistics is not None

    def statistic_problem(self, kind: str, expert: str) -> str:
        """Why a statistic cannot be had, '' if it can; as `statistics` says."""
        return "" if self.statistics is None else self.statistics.problem(kind, expert)

    def look_for_maps(self, folder: Path) -> None:
        """Look for the maps of recipes in this folder too."""
        if folder not in self.map_folders:
            self.map_folders.append(folder)

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix is stored (in, out), as transformers' Conv1D keeps it."""
        if self._base.info.config.get("model_type") not in _CONV1D_MODELS:
            return False
        return self.groups[name].kind in ("attention", "mlp") and len(self._base.info.tensors[name].shape) == 2

    def copied(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the base that are not merged, on the CPU, in the order of their names."""
        for name in sorted(self.copied_names):
            yield name, self._base.tensor(name)

    def hashes(self) -> dict[str, str]:
        """sha256 of every model's tensors (`hashing`), ``base`` for the base; computed once per process."""
        named = {"base": self._base.info, **{n: e.info for n, e in self._experts.items()}}
        with ThreadPoolExecutor(min(len(named), os.cpu_count() or 1)) as threads:
            return dict(zip(named, threads.map(hash_once, named.values()), strict=True))

    def check_hashes(self) -> None:
        """Raises `WeightsError` if the models are not those whose hashes `models.hashes` gives."""
        if not self.models.hashes:
            return
        found = self.hashes()
        for name, wanted in self.models.hashes.items():
            if name in found and found[name] != wanted:
                folder = self.base_folder if name == "base" else self._experts[name].info.folder
                raise WeightsError(
                    f"{folder}: {name!r} must be the model with sha256 {wanted[:16]}..., found {found[name][:16]}...; "
                    "its weights were changed or another model was given"
                )

    def _index(self, expert: str) -> int:
        return list(self._experts).index(expert)

    def _get(self, name: str, index: int, read: Callable[[str], Tensor]) -> Tensor:
        if self._transfers is not None:
            return self._transfers.get(name)[index]
        held = self._held.get(name)
        return (read(name) if held is None else held[index]).to(self.device)

    def _in_host_memory(self, name: str) -> list[Tensor]:
        if (held := self._held.get(name)) is not None:
            return held
        base = self._base.tensor(name)
        return [base, *(e.tensor(name) if e.changes(name) else base for e in self._experts.values())]

    def _load(self) -> None:
        """Place every tensor, once; finiteness and equality are checked on the way."""
        differs, problems = dict.fromkeys(self._experts, False), list[str]()
        for name in self.groups:
            base = self._place(self._base.tensor(name))
            problems.append(tensor_problem(base, name, "base", self._base))
            tensors = [base]
            for expert, source in self._experts.items():
                own = self._place(source.tensor(name)) if source.changes(name) else base
                if own is not base:
                    problems.append(tensor_problem(own, name, f"expert {expert!r}", source))
                    if _differ(base, own):
                        differs[expert] = True
                    elif own.dtype == base.dtype:
                        own = base  # a frozen tensor: share the base's memory
                tensors.append(own)
            if self.placement != "mapped":
                self._held[name] = tensors
        refuse([p for p in problems if p])
        for expert, is_different in differs.items():
            if not is_different:
                raise self._nothing_to_merge(expert)

    def _require_finite_files(self) -> None:
        """Raises `WeightsError` for all NaN and infinity in the files; does not look where they do not fit in free memory.

        What fits is read from the disk once, by this look, and by the merge from the page cache. Larger models would be
        read twice, which takes longer than most merges: their tensors are checked when their turn comes.
        """
        if sum(source.info.n_bytes for source in self.sources) <= MARGIN * free_bytes(torch.device("cpu")):
            refuse(file_problems(self._named_sources, self.groups))

    @property
    def _named_sources(self) -> list[tuple[str, Checkpoint | Expert]]:
        """`sources`, with the words of messages."""
        return [("base", self._base), *((f"expert {n!r}", e) for n, e in self._experts.items())]

    def _require_differences(self) -> None:
        """Raises `WeightsError` for an expert that equals the base; reads up to the first difference, without holding it."""
        names = sorted(self.groups, key=lambda n: self._base.info.tensors[n].n_bytes)  # the cheapest first
        for expert, source in self._experts.items():
            if not any(source.changes(n) and _differ(self._base.read(n), source.read(n)) for n in names):
                raise self._nothing_to_merge(expert)

    def _nothing_to_merge(self, expert: str) -> WeightsError:
        return WeightsError(
            f"expert {expert!r} equals the base in every tensor ({self._experts[expert].info.folder}): "
            "there is nothing to merge; give its fine-tuned weights or leave it out"
        )

    def _place(self, tensor: Tensor) -> Tensor:
        if self.placement == "mapped":
            return tensor
        if self.placement == "pinned":
            return tensor.pin_memory()
        return tensor.to(self.device, copy=True)

    def _choose(self, memory: float | None) -> tuple[str, str]:
        base = sum(self._base.info.tensors[n].n_bytes for n in self.groups)
        own = [n for e in self._experts.values() for n in self.groups if e.changes(n)]
        held = [self._base.info.tensors[n].n_bytes for n in (*self.groups, *own)]
        need = sum(held)
        largest = max(self._base.info.tensors[n].n_elements for n in self.groups)
        # One live model and the temporaries of its largest tensor share the device with the pool.
        other = base + 4 * SCRATCH_TENSORS * largest
        free = free_bytes(self.device)
        limit = memory * GIB if memory is not None else MARGIN * free - other
        what = f"base and {len(self._experts)} experts need {need / GIB:.2f} GiB"
        room = f"{limit / GIB:.2f} GiB " + (
            "were allowed" if memory is not None else f"of {free / GIB:.2f} GiB free are left for them"
        )
        if need <= limit:
            return "resident", f"resident on {self.device}: {what}, {room}"
        host = free_bytes(torch.device("cpu"))
        # torch rounds page-locked blocks up to powers of two.
        if self.device.type == "cuda" and sum(1 << (n - 1).bit_length() for n in held if n) <= MARGIN * host:
            return (
                "pinned",
                f"pinned in host memory: {what}, {room} on {self.device}; the host has {host / GIB:.2f} GiB free",
            )
        return "mapped", f"mapped from files: {what}, {room} on {self.device}; tensors come through the page cache"


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _differ(base: Tensor, own: Tensor) -> bool:
    wide = torch.promote_types(own.dtype, base.dtype)
    return not torch.equal(own.to(wide), base.to(wide))

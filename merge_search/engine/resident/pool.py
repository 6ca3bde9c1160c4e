"""Base and experts, ready for merging: a candidate never waits for a disk.

There are three placements, and the first that fits is taken: ``resident`` (on the device), ``pinned`` (in page-locked
host memory) and ``mapped`` (from the files, through the system's page cache). Tensors that are not resident come to a
GPU one by one, and the next is copied while the current one is merged (`transfers`). `ModelPool.placement_report` gives
the placement and its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_search.engine.checkpoints.checkpoint import Checkpoint, Expert, tied_aliases
from merge_search.engine.checkpoints.compatibility import check_models
from merge_search.engine.checkpoints.finite import file_problems, refuse, tensor_problem
from merge_search.engine.checkpoints.hashing import hash_once
from merge_search.engine.checkpoints.headers import CheckpointInfo, resolve_model
from merge_search.engine.checkpoints.layout import layout
from merge_search.engine.contracts import Factors, Tensors
from merge_search.engine.resident.coefficient_maps import MapStore
from merge_search.engine.resident.transfers import Transfers
from merge_search.errors import WeightsError
from merge_search.memory import free_bytes
from merge_search.recipe import Group, Models

__all__ = ["ModelPool", "StatisticsSource", "chosen_device"]

GIB = 2**30
MARGIN = 0.9  # share of the free memory that may be taken: allocators and other processes need the rest
SCRATCH_TENSORS = 6  # float32 temporaries of the largest tensor while it is merged
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
STREAMING_REPORT = "streamed from files: each tensor is used once, and read when its turn comes"
_log = logging.getLogger(__name__)


class StatisticsSource(Protocol):
    """Numbers measured on data."""

    def get(self, kind: str, expert: str, name: str) -> Tensor | None:
        """Return a statistic, broadcastable to the tensor; None where it was never measured.

        Args:
            kind: Kind of the statistic.
            expert: Name of the expert.
            name: Name of the tensor.
        """
        ...

    def problem(self, kind: str, expert: str) -> str:
        """Return why the statistic is unavailable, '' if it is available. Reads no weights."""
        ...


class ModelPool(Tensors):
    """Tensors of one base and its experts on one device.

    Args:
        models: Base and experts, by folder or hub id. `models.hashes` are checked if given.
        device: ``auto`` (a GPU if there is one), or torch's name of a device.
        memory: GiB that the pool may take on its device. None: all that is free, less the needs of one live model.
        map_folders: Folders where the maps of recipes are looked for.
        streaming: Each tensor will be used once, for one merge from files to files. Nothing is held outside `holding`.
            Finiteness is checked in the files if they fit in free memory together; otherwise the reader of the tensors
            checks it.

    Attributes:
        groups: Group of every tensor that is merged, in the order of the checkpoint. A tensor stored twice because it
            is tied counts once.
        copied_names: Tensors that are not merged (integers, masks) and are copied from the base.
        aliases: Tied tensors that the base stores twice: the name left out -> the name that is merged.
        placement: ``resident``, ``pinned`` or ``mapped``.
        placement_report: The placement and its reason, with figures, for the user.
        notes: Which rows were left out or matched by token.
        map_folders: As given. The list may grow.
        statistics: Answers `statistic` for everything except maps. None: nothing was measured.

    Raises:
        WeightsError: Headers show problems (all are named), a tensor holds NaN or infinity, an expert equals the base,
            or a hash is not the one given.
    Determinism: tensors have the bits of the files (adapters: see `checkpoint.Expert`), whatever the placement.
    """

    def __init__(
        self,
        models: Models,
        *,
        device: str | torch.device = "auto",
        memory: float | None = None,
        map_folders: Iterable[str | Path] = (),
        streaming: bool = False,
    ) -> None:
        problems = check_models(models.base, models.experts)
        if problems:
            raise WeightsError("these models cannot be merged:\n" + "\n".join(f"  - {p}" for p in problems))
        self.models = models
        self.device = chosen_device(device)
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
        self.placement, self.placement_report = ("mapped", STREAMING_REPORT) if streaming else self._choose(memory)
        _log.info("%s", self.placement_report)
        self._held: dict[str, list[Tensor]] = {}
        self._factors: dict[tuple[str, str], Factors | None] = {}
        needs_transfers = self.device.type == "cuda" and not streaming and self.placement != "resident"
        self._transfers = Transfers(self._in_host_memory, self.device) if needs_transfers else None
        if streaming:
            self._require_finite_files()
            self._require_differences()
        else:
            self._load()

    @property
    def base_folder(self) -> Path:
        """Folder of the base."""
        return self._base.info.folder

    @property
    def base_info(self) -> CheckpointInfo:
        """Headers and config of the base."""
        return self._base.info

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the tensor's shape, from the base's headers."""
        return self._base.info.tensors[name].shape

    def base(self, name: str) -> Tensor:
        """Return the base's tensor on the device, in its own dtype. Do not write into it."""
        return self._get(name, 0, self._base.tensor)

    def expert(self, expert: str, name: str) -> Tensor:
        """Return an expert's tensor on the device: the base's shape, its own dtype. Do not write into it."""
        return self._get(name, 1 + self._index(expert), self._experts[expert].tensor)

    def factors(self, expert: str, name: str) -> Factors | None:
        """Return an adapter's LoRA pair for a tensor, on the device; None where it has none."""
        if (expert, name) in self._factors:
            return self._factors[expert, name]
        found = self._experts[expert].factors(name)
        return found and Factors(found.b.to(self.device), found.a.to(self.device), found.transpose)

    def adapted_module(self, name: str) -> tuple[str, bool] | None:
        """Return the module whose factors change a tensor, and whether it is an embedding; None where none does."""
        return next((found for e in self._experts.values() if (found := e.adapted_module(name))), None)

    @property
    def adapter_configs(self) -> list[Mapping[str, Any]]:
        """The contents of ``adapter_config.json`` of every expert that is an adapter."""
        return [e.info.config for e in self._experts.values() if e.info.is_adapter]

    def factors_problem(self, expert: str) -> str:
        """Return why an expert's matrices have no LoRA pairs, '' if they have."""
        return self._experts[expert].factors_problem

    def expect(self, names: Sequence[str]) -> None:
        """Announce the order in which tensors will be asked for, so that they are copied to the GPU ahead of their use.

        Args:
            names: In order; empty for no order.
        """
        if self._transfers is not None:
            self._transfers.expect(names)

    @property
    def sources(self) -> tuple[Checkpoint, *tuple[Expert, ...]]:
        """The files from which tensors come: the base's, then the experts'."""
        return self._base, *self._experts.values()

    @contextmanager
    def holding(self, name: str, tensors: Sequence[Tensor] = ()) -> Iterator[None]:
        """Hold one tensor of base and experts in memory inside the context.

        Args:
            name: Name of the tensor.
            tensors: The base's and every expert's tensor, if they were read before. Otherwise they are read now.
        """
        if name in self._held:
            yield
            return
        sources = list(tensors) or self.read(name, tuple(self._experts))
        moved = {id(t): t.to(self.device) for t in sources}  # a tensor shared with the base stays shared
        self._held[name] = [moved[id(t)] for t in sources]
        try:
            yield
        finally:
            del self._held[name]

    def read(self, name: str, experts: Sequence[str]) -> list[Tensor]:
        """Return the base's tensor and those of `experts`, on the device, read from the files unless they are held."""
        held = self._held.get(name)
        if self._transfers is not None:
            held = self._transfers.get(name)
        if held is not None:
            return [held[i].to(self.device) for i in (0, *(1 + self._index(e) for e in experts))]
        base = self._base.read(name).to(self.device)
        sources = [self._experts[e] for e in experts]
        return [base, *(s.read(name).to(self.device) if s.changes(name) else base for s in sources)]

    def require_finite(self, name: str) -> None:
        """Raise `WeightsError` naming the file if a tensor of the base or of an expert is not finite."""
        tensors = self.read(name, tuple(self._experts))
        problems = [tensor_problem(t, name, *origin) for t, origin in zip(tensors, self._named_sources, strict=True)]
        refuse([p for p in problems if p])

    def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
        """Return a statistic of an expert for a tensor; None where it was never measured.

        Args:
            kind: ``map:<sha256>`` for a recipe's map, which has shape (rows,) and is on the device. Other kinds are
                asked of `statistics`.
            expert: Name of the expert.
            name: Name of the tensor.
        Raises:
            RecipeError: The map is missing or was made for other models.
            WeightsError: The map's file was changed.
        """
        if kind.startswith("map:"):
            return self._maps.get(kind.removeprefix("map:"), name)
        return None if self.statistics is None else self.statistics.get(kind, expert, name)

    @property
    def has_statistics(self) -> bool:
        """Whether statistics were measured, or can be."""
        return self.statistics is not None

    def statistic_problem(self, kind: str, expert: str) -> str:
        """Return why a statistic is unavailable, '' if it is available or nothing was measured."""
        return "" if self.statistics is None else self.statistics.problem(kind, expert)

    def look_for_maps(self, folder: Path) -> None:
        """Add `folder` to the folders where the maps of recipes are looked for."""
        if folder not in self.map_folders:
            self.map_folders.append(folder)

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix is stored (in, out), as in transformers' Conv1D."""
        if self._base.info.config.get("model_type") not in _CONV1D_MODELS:
            return False
        return self.groups[name].kind in ("attention", "mlp") and len(self._base.info.tensors[name].shape) == 2

    def copied(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the base that are not merged, on the CPU, in the order of their names."""
        for name in sorted(self.copied_names):
            yield name, self._base.tensor(name)

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of every model's tensors (`hashing`), ``base`` for the base. Computed once per process."""
        named = {"base": self._base.info, **{n: e.info for n, e in self._experts.items()}}
        with ThreadPoolExecutor(min(len(named), os.cpu_count() or 1)) as threads:
            return dict(zip(named, threads.map(hash_once, named.values()), strict=True))

    def check_hashes(self) -> None:
        """Raise `WeightsError` if a model does not have the hash that `models.hashes` gives."""
        if not self.models.hashes:
            return
        hashes = self.hashes()
        for name, wanted in self.models.hashes.items():
            if name in hashes and hashes[name] != wanted:
                folder = self.base_folder if name == "base" else self._experts[name].info.folder
                raise WeightsError(
                    f"{folder}: {name!r} must be the model with sha256 {wanted[:16]}..., found {hashes[name][:16]}...; "
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
        """Place every tensor once. Finiteness and equality are checked on the way."""
        differs, problems = dict.fromkeys(self._experts, False), list[str]()
        for name in self.groups:
            base = self._place(self._base.tensor(name))
            problems.append(tensor_problem(base, name, "base", self._base))
            tensors = [base]
            for expert, source in self._experts.items():
                tensor = self._place(source.tensor(name)) if source.changes(name) else base
                if tensor is not base:
                    problems.append(tensor_problem(tensor, name, f"expert {expert!r}", source))
                    if _differ(base, tensor):
                        differs[expert] = True
                    elif tensor.dtype == base.dtype:
                        tensor = base  # a frozen tensor shares the base's memory
                    if source.info.is_adapter:
                        self._factors[expert, name] = self.factors(expert, name)
                tensors.append(tensor)
            if self.placement != "mapped":
                self._held[name] = tensors
        refuse([p for p in problems if p])
        for expert, is_different in differs.items():
            if not is_different:
                raise self._nothing_to_merge(expert)

    def _require_finite_files(self) -> None:
        """Raise `WeightsError` naming all NaN and infinity in the files, if the files fit in free memory.

        Files that fit are read from the disk once, by this check, and by the merge from the page cache. Larger files
        would be read from the disk twice, which takes longer than most merges. Their tensors are checked when they are
        merged.
        """
        if sum(source.info.n_bytes for source in self.sources) <= MARGIN * free_bytes(torch.device("cpu")):
            refuse(file_problems(self._named_sources, self.groups))

    @property
    def _named_sources(self) -> list[tuple[str, Checkpoint | Expert]]:
        """`sources`, each with its name in messages."""
        return [("base", self._base), *((f"expert {n!r}", e) for n, e in self._experts.items())]

    def _require_differences(self) -> None:
        """Raise `WeightsError` for an expert that equals the base. Reads up to the first difference only."""
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
        """Return the placement and its report."""
        headers = self._base.info.tensors
        changed = [n for e in self._experts.values() for n in self.groups if e.changes(n)]
        sizes = [headers[n].n_bytes for n in (*self.groups, *changed)]
        need = sum(sizes)
        if memory is None:
            # One live model and the temporaries of its largest tensor share the device with the pool.
            live = sum(headers[n].n_bytes for n in self.groups)
            scratch = 4 * SCRATCH_TENSORS * max(headers[n].n_elements for n in self.groups)
            free = free_bytes(self.device)
            limit = MARGIN * free - (live + scratch)
            room = f"{limit / GIB:.2f} GiB of {free / GIB:.2f} GiB free are left for them"
        else:
            limit = memory * GIB
            room = f"{limit / GIB:.2f} GiB were allowed"
        needs = f"base and {len(self._experts)} experts need {need / GIB:.2f} GiB, {room}"
        if need <= limit:
            return "resident", f"resident on {self.device}: {needs}"
        host = free_bytes(torch.device("cpu"))
        page_locked = sum(1 << (n - 1).bit_length() for n in sizes if n)  # torch rounds blocks up to powers of two
        if self.device.type == "cuda" and page_locked <= MARGIN * host:
            report = f"pinned in host memory: {needs} on {self.device}; the host has {host / GIB:.2f} GiB free"
            return "pinned", report
        return "mapped", f"mapped from files: {needs} on {self.device}; tensors come through the page cache"


def chosen_device(device: str | torch.device) -> torch.device:
    """The device that a name means; ``auto`` is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _differ(base: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(other.dtype, base.dtype)
    return not torch.equal(other.to(wide), base.to(wide))

"""DataStatistics: every statistic measured once per study, when it is first asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.live_model import LiveModel
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.statistics import Kind, load, parse
from merge_search.engine.statistics.rows import TaskRows, Work, rows_of_experts
from merge_search.engine.statistics.store import FOLDER, FolderStatistics, StatisticFile, prune, write
from merge_search.errors import NonFiniteError, RecipeError, WeightsError
from merge_search.recipe import Models, Operator, Recipe

__all__ = ["MAX_GIB", "N_ROWS", "DataStatistics"]

N_ROWS = 64
"""Rows per task. DF-Merge takes 30, Fisher merging and RegMean 256."""
MAX_GIB = 32.0
"""What the files of one study may take on disk: float32 statistics of eight billion parameters are 30 GiB a file."""
RECENT = 4
"""So many files at scaled models are kept per expert, whatever they take: a candidate asks for a few at a time."""
VERSION = 1
"""Raise it when the numbers of any statistic change: files of older versions are then measured again."""
_log = logging.getLogger(__name__)


class DataStatistics:
    """A `pool.StatisticsSource`: kinds of `KINDS` from data, any other from files that the user put into `folder`.

    Kept in ``<folder>/<key>.safetensors``; the key is a hash of kind, point, weights, dtype, tasks, rows, seed and
    `VERSION`, so that what is found is what would be measured. A file that is damaged is measured again. Files beyond
    `max_gib` are removed, the longest unused first, but never one at a model itself that this process has used; a statistic
    whose file is gone is measured again, to the same bits.

    A statistic may be asked for while a recipe is being written into the live model: the model's weights are put aside
    (on the host) and come back bit for bit; engines see by version counters that they were touched.

    Args:
        live: The model that the evaluators are bound to; None: only what is on file can be had.
        owners: Task -> expert whose statistics it serves (`rows.rows_of_experts`).
        n_rows: Per task.
        folder: Files of others lie in it as ``<kind>/<expert>.safetensors`` (`store.FolderStatistics`).
        max_gib: Of disk, for the measured files in `folder`.
        dtype: In which the live model computes; None: that of the files.
    Attributes:
        questions: Asked so far by this object; a row with a backward pass counts three times.
    """

    def __init__(
        self,
        pool: ModelPool,
        live: LiveModel | None,
        evaluators: Sequence[object],
        owners: Mapping[str, str],
        *,
        folder: str | Path,
        n_rows: int = N_ROWS,
        seed: int = 0,
        dtype: str | None = None,
        max_gib: float = MAX_GIB,
    ) -> None:
        self.pool, self.live, self.folder = pool, live, Path(folder)
        self.questions = 0
        self._evaluators, self._owners = list(evaluators), dict(owners)
        self._n_rows, self._seed, self._dtype, self._max_bytes = n_rows, seed, dtype, max_gib * 2**30
        self._given = FolderStatistics(self.folder)
        self._files: dict[tuple[str, str], StatisticFile] = {}
        self._unwritten: dict[tuple[str, str], dict[str, Tensor]] = {}

    # --- what a pool asks

    def get(self, kind: str, expert: str, name: str) -> Tensor | None:
        """The statistic on the CPU, float32; None where the kind says nothing of the tensor.

        Raises:
            RecipeError: it cannot be measured, and why.
            NonFiniteError, EvaluationError, torch.OutOfMemoryError: measuring failed; the live model is as it was.
        """
        if parse(kind) is None:
            return self._given.get(kind, expert, name)
        at = (kind, expert)
        if at not in self._files and at not in self._unwritten:
            self._provide(kind, expert)
        return self._unwritten[at].get(name) if at in self._unwritten else self._files[at].get(name)

    def problem(self, kind: str, expert: str) -> str:
        """Why a statistic cannot be had, '' if it can. Reads no weights."""
        if parse(kind) is None:
            return self._given.problem(kind, expert)
        if not self._rows.get(expert):
            return (
                "no task has a differentiable loss and rows to fit on: give tasks a training split, or set splits.fit"
            )
        if self.live is None and not self._path(kind, expert).is_file():
            return f"it was not measured in this study, or its file was removed to keep statistics.max_gib (looked in {self.folder})"
        return ""

    def files(self) -> dict[str, str | Path]:
        """What was asked for so far, as `export_folder` takes it in `extra`: a recipe can be merged again with it."""
        found: dict[str, str | Path] = {
            f"{FOLDER}/{kind}/{expert}.safetensors": file.path for (kind, expert), file in self._files.items()
        }
        for kind, expert in self._given.asked():
            path = self._given.path(kind, expert)
            assert path is not None
            found[f"{FOLDER}/{kind}/{expert}.safetensors"] = path
        return found

    # --- one statistic

    @cached_property
    def _rows(self) -> dict[str, tuple[TaskRows, ...]]:
        experts = list(self.pool.models.experts)
        return rows_of_experts(self._evaluators, experts, self._owners, n_rows=self._n_rows, seed=self._seed)

    def _provide(self, kind: str, expert: str) -> None:
        path = self._path(kind, expert)
        if path.is_file():
            try:
                self._files[kind, expert] = StatisticFile(path, needs_checksum=True)
                with contextlib.suppress(OSError):  # a folder that may only be read
                    os.utime(path)  # used now: `prune` takes the longest unused
                return
            except WeightsError as error:
                _log.warning("%s; measured again", error)
        if problem := self.problem(kind, expert) or ("" if self.live else "its file is damaged"):
            raise RecipeError(f"the statistic {kind!r} of expert {expert!r} cannot be had: {problem}")
        made = self._measure(kind, expert)
        try:
            write(path, made, self._about(kind, expert))
        except OSError as error:
            _log.warning("%s cannot be written, the statistic is kept in memory: %s", path, error)
            self._unwritten[kind, expert] = made
            return
        self._files[kind, expert] = StatisticFile(path, needs_checksum=True)
        self._prune()

    def _prune(self) -> None:
        used = list(self._files.items())  # in the order of their first use
        scaled = [file.path for (kind, _), file in used if "@" in kind]
        keep = {file.path for (kind, _), file in used if "@" not in kind}
        keep.update(scaled[-RECENT * len(self.pool.models.experts) :])
        removed = set(prune(self.folder, self._max_bytes, keep))
        if removed:
            _log.info("%d statistics removed from %s: more than max_gib", len(removed), self.folder)
        self._files = {at: file for at, file in used if file.path not in removed}

    def _about(self, kind: str, expert: str) -> dict[str, Any]:
        """All that the numbers depend on."""
        entry, _ = _entry(kind)
        hashes = self.pool.hashes()
        return {
            "version": VERSION,
            "kind": kind,
            "base": hashes["base"],
            "expert": None if entry.point == "base" else hashes[expert],
            "dtype": self._dtype,
            "seed": self._seed,
            "tasks": [[t.task, t.fingerprint, t.rows] for t in self._rows[expert]],
        }

    def _path(self, kind: str, expert: str) -> Path:
        text = json.dumps(self._about(kind, expert), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _measure(self, kind: str, expert: str) -> dict[str, Tensor]:
        live = self.live
        assert live is not None
        entry, c = _entry(kind)
        views = {name: live.views[name] for name in self.pool.groups if name in live.views}
        work = Work(live.model, views, self.pool.groups, self._rows[expert])
        _log.info("measuring %s of expert %r on %d rows", kind, expert, work.n_rows)
        self.questions += entry.questions * work.n_rows
        with _borrowed(views):
            MergeEngine(self.pool, compile=False).apply(self._point(entry, c, expert), views)
            try:
                made = load(entry)(work)
            except NonFiniteError as error:
                raise NonFiniteError(f"measuring {kind!r} of expert {expert!r}: {error}") from error
        return {name: t.to("cpu") for name, t in made.items()}

    def _point(self, entry: Kind, c: float | None, expert: str) -> Recipe:
        """The weights at which a statistic is measured."""
        models = Models(base=self.pool.models.base, experts={expert: self.pool.models.experts[expert]})
        if c is not None:
            return Recipe(models=models, coefficients={expert: c})
        name = "" if entry.point == "base" else expert
        return Recipe(models=models, operator=Operator(name="passthrough", options={"expert": name}))


def _entry(kind: str) -> tuple[Kind, float | None]:
    found = parse(kind)
    assert found is not None
    return found


@contextmanager
def _borrowed(views: Mapping[str, Tensor]) -> Iterator[None]:
    """Weights may be overwritten inside; afterwards they are those of before, bit for bit."""
    with torch.no_grad():
        kept = {name: view.to("cpu", copy=True) for name, view in views.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(kept[name])

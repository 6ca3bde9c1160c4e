"""DataStatistics: every statistic is measured once per study, when it is first asked for."""

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
from merge_search.engine.statistics.outside import measured
from merge_search.engine.statistics.rows import TaskRows, Work, rows_of_experts
from merge_search.engine.statistics.store import FOLDER, FolderStatistics, StatisticFile, prune, write
from merge_search.errors import NonFiniteError, RecipeError, WeightsError
from merge_search.recipe import Models, Operator, Recipe
from merge_search.rules import StatisticInfo, statistic_named

__all__ = ["MAX_GIB", "N_ROWS", "DataStatistics"]

N_ROWS = 64
"""Rows per task. DF-Merge takes 30, Fisher merging and RegMean 256."""
MAX_GIB = 32.0
"""Most disk space for the files of one study, in GiB. float32 statistics of eight billion parameters are 30 GiB a file.
"""
RECENT = 4
"""Files at scaled models that are kept per expert whatever they take, because a candidate asks for a few at a time."""
VERSION = 1
"""Raise this when the numbers of any statistic change. Files of older versions are then measured again."""
_log = logging.getLogger(__name__)


class DataStatistics:
    """A `StatisticsSource`: kinds of `rules.STATISTICS` from data, all others from users' files in `folder`.

    Measured statistics are kept in ``<folder>/<key>.safetensors``. The key is a hash of kind, point, weights, dtype,
    tasks, rows, seed and `VERSION`, and of the rule file and version of a statistic from outside, so a file found by
    its key holds what would be measured. A damaged file is measured again. Once the files exceed `max_gib`, the longest
    unused are removed first. Files at a model itself that this process has used are never removed. A statistic whose
    file was removed is measured again, to the same bits.

    A statistic may be asked for while a recipe is being written into the live model. The model's weights are then saved
    on the host and restored bit for bit. Engines notice by version counters that the weights were touched.

    Args:
        pool: Base and experts.
        live: The model that the evaluators are bound to. None: only statistics on file are available.
        evaluators: Evaluators without a differentiable loss are ignored.
        teachers: Task -> the expert whose statistics it serves (`rows.rows_of_experts`).
        folder: Folder of the measured files. Files of users lie in it as ``<kind>/<expert>.safetensors``
            (`store.FolderStatistics`).
        n_rows: Most rows per task.
        seed: The study's seed.
        dtype: Dtype in which the live model computes. None: that of the files.
        max_gib: Most disk space for the measured files in `folder`, in GiB.
    Attributes:
        questions: Questions asked so far by this object. A row with a backward pass counts three times.
    """

    def __init__(
        self,
        pool: ModelPool,
        live: LiveModel | None,
        evaluators: Sequence[object],
        teachers: Mapping[str, str],
        *,
        folder: str | Path,
        n_rows: int = N_ROWS,
        seed: int = 0,
        dtype: str | None = None,
        max_gib: float = MAX_GIB,
    ) -> None:
        self.pool, self.live, self.folder = pool, live, Path(folder)
        self.questions = 0
        self._evaluators, self._teachers = list(evaluators), dict(teachers)
        self._n_rows, self._seed, self._dtype, self._max_bytes = n_rows, seed, dtype, max_gib * 2**30
        self._given = FolderStatistics(self.folder)
        self._rows: dict[int | None, dict[str, tuple[TaskRows, ...]]] = {}
        self._files: dict[tuple[str, str], StatisticFile] = {}
        self._unwritten: dict[tuple[str, str], dict[str, Tensor]] = {}

    # --- called by the pool

    def get(self, kind: str, expert: str, name: str) -> Tensor | None:
        """Return the statistic on the CPU, float32; None where the kind has no value for the tensor.

        Raises:
            RecipeError: It cannot be measured; the message says why.
            NonFiniteError: Measuring gave NaN or infinity. The live model is as it was.
            EvaluationError: A loss failed. The live model is as it was.
            torch.OutOfMemoryError: The device is full. The live model is as it was.
        """
        if statistic_named(kind) is None:
            return self._given.get(kind, expert, name)
        key = (kind, expert)
        if key not in self._files and key not in self._unwritten:
            self._provide(kind, expert)
        return self._unwritten[key].get(name) if key in self._unwritten else self._files[key].get(name)

    def problem(self, kind: str, expert: str) -> str:
        """Return why a statistic is unavailable, '' if it is available. Reads no weights."""
        if statistic_named(kind) is None:
            return self._given.problem(kind, expert)
        entry, _ = _entry(kind)
        if not self._rows_of(entry, expert):
            return (
                "no task has a differentiable loss and rows to fit on: give tasks a training split, or set splits.fit"
            )
        if self.live is not None and entry.is_gram and (size := self._gram_bytes) > self._max_bytes:
            return (
                f"Gram matrices of all experts take {size / 2**30:.3g} GiB, and statistics.max_gib is "
                f"{self._max_bytes / 2**30:g}; raise it where disk and device have the room"
            )
        if self.live is None and not self._path(kind, expert).is_file():
            return (
                "it was not measured in this study, or its file was removed to keep statistics.max_gib "
                f"(looked in {self.folder})"
            )
        return ""

    def files(self) -> dict[str, str | Path]:
        """Return the files asked for so far in the form that `export_folder` takes as `extra`.

        A recipe can be merged again with these files.
        """
        paths: dict[str, str | Path] = {
            f"{FOLDER}/{kind}/{expert}.safetensors": file.path for (kind, expert), file in self._files.items()
        }
        for kind, expert in self._given.asked():
            path = self._given.path(kind, expert)
            assert path is not None
            paths[f"{FOLDER}/{kind}/{expert}.safetensors"] = path
        return paths

    # --- one statistic

    @cached_property
    def _gram_bytes(self) -> int:
        """Bytes of one Gram matrix, float32, per expert and linear layer."""
        linear = [n for n, g in self.pool.groups.items() if g.kind in ("attention", "mlp")]
        shapes = [(self.pool.shape(n), self.pool.is_transposed(n)) for n in linear]
        sizes = [shape[0 if transposed else 1] ** 2 for shape, transposed in shapes if len(shape) == 2]
        return 4 * sum(sizes) * len(self.pool.models.experts)

    def _rows_by_expert(self, n_prompts: int | None) -> dict[str, tuple[TaskRows, ...]]:
        if n_prompts not in self._rows:
            self._rows[n_prompts] = rows_of_experts(
                self._evaluators,
                list(self.pool.models.experts),
                self._teachers,
                n_rows=self._n_rows if n_prompts is None else n_prompts,
                seed=self._seed,
                needs_labels=n_prompts is None,
            )
        return self._rows[n_prompts]

    def _provide(self, kind: str, expert: str) -> None:
        path = self._path(kind, expert)
        if path.is_file():
            try:
                self._files[kind, expert] = StatisticFile(path, needs_checksum=True)
                with contextlib.suppress(OSError):  # the folder may be read-only
                    os.utime(path)  # marks the file as used, for `prune`
                return
            except WeightsError as error:
                _log.warning("%s; measured again", error)
        if problem := self.problem(kind, expert) or ("" if self.live else "its file is damaged"):
            raise RecipeError(f"the statistic {kind!r} of expert {expert!r} cannot be had: {problem}")
        tensors = self._measure(kind, expert)
        try:
            write(path, tensors, self._about(kind, expert))
        except OSError as error:
            _log.warning("%s cannot be written, the statistic is kept in memory: %s", path, error)
            self._unwritten[kind, expert] = tensors
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
            _log.info("%d statistics removed from %s, which had grown beyond max_gib", len(removed), self.folder)
        self._files = {key: file for key, file in used if file.path not in removed}

    def _about(self, kind: str, expert: str) -> dict[str, Any]:
        """Return everything that the numbers depend on."""
        entry, _ = _entry(kind)
        hashes = self.pool.hashes()
        about = {
            "version": VERSION,
            "kind": kind,
            "base": hashes["base"],
            "expert": hashes[expert] if entry.is_of_one_expert else None,
            "dtype": self._dtype,
            "seed": self._seed,
            "tasks": [[t.task, t.fingerprint, t.rows] for t in self._rows_of(entry, expert)],
        }
        if entry.reads == "all":
            about["experts"] = [hashes[e] for e in self.pool.models.experts]
        if entry.origin is not None:
            about["rule"] = [entry.version, entry.origin.sha256]
        return about

    def _rows_of(self, entry: StatisticInfo, expert: str) -> tuple[TaskRows, ...]:
        """Return the rows of an expert's tasks, or those of all experts where a statistic is of all of them."""
        rows = self._rows_by_expert(entry.n_prompts)
        if entry.reads != "all":
            return rows[expert]
        return tuple({t.task: t for tasks in rows.values() for t in tasks}.values())

    def _path(self, kind: str, expert: str) -> Path:
        text = json.dumps(self._about(kind, expert), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _measure(self, kind: str, expert: str) -> dict[str, Tensor]:
        live = self.live
        assert live is not None
        entry, c = _entry(kind)
        views = {name: live.views[name] for name in self.pool.groups if name in live.views}
        tasks = self._rows_of(entry, expert)
        work = Work(live.model, views, self.pool.groups, tasks, self._count, self.pool, expert, self._seed)
        _log.info("measuring %s of expert %r on %d rows", kind, expert, work.n_rows)
        self._count(entry.questions * work.n_rows)
        with _borrowed(views):
            MergeEngine(self.pool, compile=False).apply(self._point(entry, c, expert), views)
            try:
                tensors = measured(entry, work)
            except NonFiniteError as error:
                raise NonFiniteError(f"measuring {kind!r} of expert {expert!r}: {error}") from error
        return {name: t.to("cpu") for name, t in tensors.items()}

    def _count(self, questions: int) -> None:
        self.questions += questions

    def _point(self, entry: StatisticInfo, c: float | None, expert: str) -> Recipe:
        """Return the recipe of the weights at which a statistic is measured."""
        models = Models(base=self.pool.models.base, experts={expert: self.pool.models.experts[expert]})
        if c is not None:
            return Recipe(models=models, coefficients={expert: c})
        name = "" if entry.point == "base" else expert
        return Recipe(models=models, operator=Operator(name="passthrough", options={"expert": name}))


def _entry(kind: str) -> tuple[StatisticInfo, float | None]:
    parsed = statistic_named(kind)
    assert parsed is not None
    return parsed


@contextmanager
def _borrowed(views: Mapping[str, Tensor]) -> Iterator[None]:
    """Allow the weights to be overwritten inside the context. They are restored bit for bit on exit."""
    with torch.no_grad():
        saved = {name: view.to("cpu", copy=True) for name, view in views.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(saved[name])

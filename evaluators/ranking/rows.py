"""Options and sequences of a ranking task: everything that is known before a weight is loaded. Imports no torch.

A file of sequences is either

- ``.jsonl``: one object a line with the numbers of a user's items, in order, under `key`; or
- a log of interactions as MovieLens has them, one a line: ``user::item::rating::time`` (``.dat``), or columns named
  ``userId``, ``movieId`` and ``timestamp`` (``.csv``). A user's items are ordered by time, and ratings are not read.

Items are whole numbers from 1 on, the rows of the model's item matrix. The last item of a sequence is the right answer,
and the others are the question.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from evaluators.labelled.rows import LabelledTask, TaskReader, json_lines, read_all
from merge_search.errors import nearest
from merge_search.evaluation import SplitShares
from merge_search.options import PathList

__all__ = ["Options", "RankingTask", "SequenceRow", "TaskOptions", "read_tasks"]

COLUMNS = ("userId", "movieId", "timestamp")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


class TaskOptions(BaseModel):
    """One task: sequences of one market.

    Attributes:
        data: Files of sequences to score on.
        train: Files of sequences to fit on.
        key: The key of the items in a ``.jsonl`` file.
        items: The items that can be recommended: a JSON file with a list of numbers. None: all that occur in `data` and
            `train`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[PathList, Field(min_length=1)]
    train: PathList = []
    key: str = "items"
    items: str | None = None


class Options(BaseModel):
    """An ``evaluate`` entry of the study file, without ``evaluator``.

    Attributes:
        tasks: Options of each task by its name.
        include_path: Folders of the tasks' files; none: the folder of the study file.
        k: Lengths of the list of recommendations. The first one's NDCG is the main metric.
        negatives: Items that the right one is ranked among, drawn for each question; None: all of the task's items.
        max_length: Longest history; earlier items are cut.
        batch_size: Sequences of one forward pass.
        limit: Most sequences per task: the first in the order of questions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: Annotated[dict[Annotated[str, Field(pattern=r"^[^\s/]+$")], TaskOptions], Field(min_length=1)]
    include_path: PathList = []
    k: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_as_list), Field(min_length=1)] = [10]
    negatives: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=1)] = 50
    batch_size: Annotated[int, Field(ge=1)] = 64
    limit: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class SequenceRow:
    """A question.

    Attributes:
        history: The items before the last one.
        target: The last item.
        label: The place of the target among the task's items.
        hash: The hash of the whole sequence.
    """

    history: tuple[int, ...]
    target: int
    label: int
    hash: str

    @property
    def question(self) -> str:
        return json.dumps(self.history)


@dataclass(frozen=True)
class RankingTask(LabelledTask[SequenceRow]):
    """A task whose files have been read.

    Attributes:
        items: The items that can be recommended, ascending.
    """

    items: tuple[int, ...]

    @property
    def n_outcomes(self) -> int:
        return len(self.items)

    def digest(self) -> dict[str, Any]:
        return {"items": hashlib.sha256(json.dumps(self.items).encode()).hexdigest()}


def read_tasks(options: Options, shares: SplitShares, folder: Path | None = None) -> list[RankingTask]:
    """Read and split all sequences.

    Args:
        options: The evaluator's options.
        shares: Shares of the splits.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Every problem of every task.
    """
    return read_all(_Reader, options, shares, folder)


class _Reader(TaskReader[SequenceRow]):
    def __init__(self, name: str, task: TaskOptions, problems: list[str], **at: Any) -> None:
        super().__init__(name, problems, **at)
        self.task = task

    def read(self, shares: SplitShares) -> RankingTask | None:
        before = len(self.problems)
        data, train = (self._sequences(f, getattr(self.task, f)) for f in ("data", "train"))
        items = self._items({item for sequence in [*data, *train] for item in sequence})
        if len(self.problems) > before or items is None:
            return None
        place = {item: i for i, item in enumerate(items)}
        unknown = sorted({s[-1] for s in [*data, *train]} - place.keys())
        if unknown:
            self.note("items", f"sequences end in {len(unknown)} items that are not listed, the first is {unknown[0]}")
            return None
        rows, fit = ([_row(s, place) for s in sequences] for sequences in (data, train))
        scored, kept = self.split(rows, fit, shares, has_train=bool(self.task.train))
        return RankingTask(self.name, scored, kept, tuple(items))

    def _items(self, seen: set[int]) -> list[int] | None:
        """The items that can be recommended, ascending; None, with a note, if there are too few."""
        items: object = sorted(seen)
        if self.task.items is not None:
            path = self.file("items", self.task.items)
            if path is None:
                return None
            try:
                items = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                self.note("items", f"{path} is not JSON: {error}")
                return None
        if not isinstance(items, list) or not all(_is_item(i) for i in items):
            self.note("items", "must be a list of whole numbers from 1 on")
            return None
        if len(set(items)) < 2 and seen:
            self.note("items", f"needs at least two items to rank, found {len(set(items))}")
        return sorted(set(items))

    def _sequences(self, field: str, files: Sequence[str]) -> list[tuple[int, ...]]:
        """The different sequences of all files, in their order."""
        out: dict[tuple[int, ...], None] = {}
        for text in files:
            path = self.file(field, text)
            if path is None:
                continue
            read = {".jsonl": self._listed, ".dat": _movielens, ".csv": _columns}.get(path.suffix)
            if read is None:
                self.note(field, f"{path} must be a .jsonl file of sequences or a .dat or .csv log of interactions")
                continue
            found, wrong = [], []
            for where, sequence in read(path):
                if isinstance(sequence, str):
                    wrong.append(f"{path}, {where}: {sequence}")
                elif len(sequence) < 2:
                    wrong.append(f"{path}, {where}: needs at least two items, a history and the next one")
                else:
                    found.append(tuple(sequence))
            out |= dict.fromkeys(found)
            self.note_lines(field, path, wrong)
        return list(out)

    def _listed(self, path: Path) -> Iterator[tuple[str, Sequence[int] | str]]:
        for line, item in json_lines(path):
            if isinstance(item, str):
                yield f"line {line}", item
            elif self.task.key not in item:
                yield f"line {line}", f"no field {self.task.key!r}{nearest(self.task.key, item)}"
            else:
                items = item[self.task.key]
                good = isinstance(items, list) and all(_is_item(i) for i in items)
                yield f"line {line}", items if good else f"items must be whole numbers from 1 on, got {items!r:.60}"


def _row(sequence: tuple[int, ...], place: dict[int, int]) -> SequenceRow:
    digest = hashlib.sha256(json.dumps(sequence).encode()).hexdigest()
    return SequenceRow(sequence[:-1], sequence[-1], place[sequence[-1]], digest)


def _is_item(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _movielens(path: Path) -> Iterator[tuple[str, Sequence[int] | str]]:
    """Sequences by user of lines ``user::item::rating::time``."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = ((f"line {n}", line.split("::")) for n, line in enumerate(lines, start=1) if line.strip())
    return _by_user((where, (f[0], f[1], f[3]) if len(f) == 4 else None) for where, f in fields)


def _columns(path: Path) -> Iterator[tuple[str, Sequence[int] | str]]:
    """Sequences by user of a table with the columns `COLUMNS`."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        known = reader.fieldnames or []
        if absent := [c for c in COLUMNS if c not in known]:
            yield "line 1", f"no column {absent[0]!r}{nearest(absent[0], known)}"
            return
        rows = [(f"line {n}", tuple(row[c] for c in COLUMNS)) for n, row in enumerate(reader, start=2)]
    yield from _by_user(rows)


def _by_user(rows: Any) -> Iterator[tuple[str, Sequence[int] | str]]:
    """Each user's items by time. `rows` are places, each with user, item and time as texts, or None."""
    users: dict[str, list[tuple[float, int]]] = {}
    for where, row in rows:
        try:
            user, item, time = row[0], int(row[1]), float(row[2])
            if item < 1:
                raise ValueError
        except (TypeError, ValueError):
            yield where, "must have a user, an item (a whole number from 1 on), a rating and a time"
            continue
        users.setdefault(user, []).append((time, item))
    for user, events in users.items():
        yield f"user {user}", [item for _, item in sorted(events, key=lambda e: e[0])]

"""Rows of labelled questions: files, splits, rows to fit on. Everything before a weight is loaded. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from merge_search.errors import StudyFileError, nearest
from merge_search.evaluation import Split, SplitShares, question_order, split_of
from merge_search.options import folders

__all__ = ["SCORED", "LabelledRow", "LabelledTask", "TaskReader", "json_lines", "read_all"]

SCORED = (Split.SEARCH, Split.VALIDATION, Split.TEST)
SHOWN_PER_FILE = 5
"""Number of wrong lines that are reported per file. A file of another format is wrong in every line."""

_log = logging.getLogger(__name__)


class LabelledRow(Protocol):
    """A question.

    Attributes:
        question: What is asked. Rows with equal questions share a split, and none of them is fitted on and scored.
        label: The number of the right answer.
        hash: The hash of question and label.
    """

    @property
    def question(self) -> str: ...
    @property
    def label(self) -> int: ...
    @property
    def hash(self) -> str: ...


RowKind = TypeVar("RowKind", bound=LabelledRow)


@dataclass(frozen=True)
class LabelledTask(Generic[RowKind]):
    """A task whose files have been read.

    Attributes:
        name: Its name.
        scored: The rows of the search, validation and test split, each in the order of questions.
        fit: The rows to fit on. None of their questions is in `scored`, unless they have no labels (label -1).
    """

    name: str
    scored: Mapping[Split, tuple[RowKind, ...]]
    fit: tuple[RowKind, ...]

    @property
    def has_labels(self) -> bool:
        """Whether the rows to fit on have labels."""
        return all(row.label >= 0 for row in self.fit)

    @property
    def n_outcomes(self) -> int:
        """The number of answers to choose from."""
        raise NotImplementedError

    def digest(self) -> dict[str, Any]:
        """Everything besides the rows and the weights that an answer depends on, as JSON."""
        raise NotImplementedError


class TaskReader(Generic[RowKind]):
    """Reads the files of one task. Adds what is wrong to `problems` and goes on.

    Args:
        name: The task's name.
        problems: Sentences about what is wrong.
        include_path: Folders of the files; none: `folder`.
        folder: The folder that relative paths are relative to; None: the current directory.
        limit: Most documents: the first in the order of questions.
        test_inputs: Whether the questions of the test split are fitted on, without their labels.
    """

    def __init__(
        self,
        name: str,
        problems: list[str],
        *,
        include_path: Sequence[str],
        folder: Path | None,
        limit: int | None,
        test_inputs: bool = False,
    ) -> None:
        self.name, self.problems, self.limit, self.test_inputs = name, problems, limit, test_inputs
        self.folders = folders(include_path, folder)

    def note(self, field: str, text: str) -> None:
        self.problems.append(f"tasks.{self.name}.{field}: {text}")

    def note_lines(self, field: str, path: Path, wrong: Sequence[str]) -> None:
        """Note the first few wrong lines of a file, and how many more there are."""
        for problem in wrong[:SHOWN_PER_FILE]:
            self.note(field, problem)
        if len(wrong) > SHOWN_PER_FILE:
            self.note(field, f"{path}: {len(wrong) - SHOWN_PER_FILE} more lines are wrong")

    def file(self, field: str, text: str) -> Path | None:
        """The file that `text` names: an absolute path, or the file in the first of `folders` that has it."""
        candidates = [folder / Path(text).expanduser() for folder in self.folders]
        for path in candidates:
            if path.is_file():
                return path
        parent = candidates[0].parent
        known = [p.name for p in parent.iterdir() if p.is_file()] if parent.is_dir() else []
        self.note(field, f"no file {' or '.join(map(str, dict.fromkeys(candidates)))}{nearest(Path(text).name, known)}")
        return None

    def split(
        self, data: Sequence[RowKind], train: Sequence[RowKind], shares: SplitShares, *, has_train: bool
    ) -> tuple[dict[Split, tuple[RowKind, ...]], tuple[RowKind, ...]]:
        """The rows to score on by split, and the rows to fit on.

        Args:
            data: Rows to score on.
            train: Rows to fit on. With rows of its own to fit on, a task is scored on its whole search split.
            shares: Shares of the splits.
            has_train: Whether the task names files to fit on; without them the fit share of `data` is fitted on.
        """
        by_split = self._by_split(data, replace(shares, fit=0.0) if train or self.test_inputs else shares)
        n = sum(map(len, by_split.values()))
        for name in SCORED:
            if len(by_split[name]) < 2:
                self.note(
                    "data",
                    f"the {name} split needs at least 2 documents for an error bar, got {len(by_split[name])} of {n}; "
                    "give more data, a larger share, or a larger limit",
                )
        scored = {s: by_split[s] for s in SCORED}
        if self.test_inputs:
            return scored, tuple(_unlabelled(row) for row in scored[Split.TEST])
        return scored, self._disjoint(train if has_train else by_split[Split.FIT], scored)

    def _by_split(self, rows: Sequence[RowKind], shares: SplitShares) -> dict[Split, tuple[RowKind, ...]]:
        """Rows by split. A question with several labels goes to the split of its smallest hash."""
        first: dict[str, str] = {}
        for row in rows:
            first[row.question] = min(row.hash, first.get(row.question, row.hash))
        ordered = sorted(rows, key=lambda r: (question_order(r.hash), r.hash))[: self.limit]
        split: dict[Split, list[RowKind]] = {s: [] for s in Split}
        for row in ordered:
            split[split_of(first[row.question], shares)].append(row)
        return {s: tuple(members) for s, members in split.items()}

    def _disjoint(self, fit: Sequence[RowKind], scored: Mapping[Split, Sequence[RowKind]]) -> tuple[RowKind, ...]:
        """The rows of `fit` whose question is not in `scored`: nothing scored may be fitted on."""
        asked = {row.question for rows in scored.values() for row in rows}
        kept = tuple(row for row in fit if row.question not in asked)
        n_left_out = len(fit) - len(kept)
        if fit and not kept:
            self.note(
                "train", f"all questions of its {len(fit)} rows also stand in data, so there is nothing to fit on"
            )
        elif n_left_out:
            _log.warning(
                "task %s: %d of %d rows to fit on are also questions: left out", self.name, n_left_out, len(fit)
            )
        return kept


def read_all(
    reader: Callable[..., Any], options: Any, shares: SplitShares, folder: Path | None, *, test_inputs: bool = False
) -> list[Any]:
    """Read and split the files of all tasks.

    Args:
        reader: Makes the `TaskReader` of one task, from its name, its options and the list of problems. Its method
            ``read(shares)`` gives the task, or None if something is wrong.
        options: The evaluator's options, with ``tasks``, ``include_path`` and ``limit``.
        shares: Shares of the splits.
        folder: The folder that relative paths are relative to; None: the current directory.
        test_inputs: As for `TaskReader`.

    Raises:
        StudyFileError: Every problem of every task.
    """
    problems: list[str] = []
    at = {
        "include_path": options.include_path, "folder": folder, "limit": options.limit, "test_inputs": test_inputs,
    }  # fmt: skip
    tasks = [reader(name, task, problems, **at).read(shares) for name, task in options.tasks.items()]
    if problems:
        raise StudyFileError(problems)
    return [t for t in tasks if t is not None]


def _unlabelled(row: Any) -> Any:
    """The row with the label -1 and the hash of its question alone."""
    return replace(row, label=-1, hash=hashlib.sha256(row.question.encode()).hexdigest())


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Line numbers, each with the line's mapping or a text that says what is wrong with it. Blank lines are skipped."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        yield 1, f"is not UTF-8: {error}"
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                item = json.loads(line)
            except ValueError as error:
                item = f"is not JSON: {error}"
            yield number, item if isinstance(item, dict | str) else f"must be a mapping, got {type(item).__name__}"

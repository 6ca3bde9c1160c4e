"""Options, rows and splits of labelled texts: everything that is known before a weight is loaded. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import SafetensorError, safe_open

from merge_search.errors import StudyFileError, nearest
from merge_search.evaluation import Split, SplitShares, question_order, split_of
from merge_search.options import PathList, folders

__all__ = ["HeadFile", "Options", "Row", "TaskRows", "read_tasks"]

SCORED = (Split.SEARCH, Split.VALIDATION, Split.TEST)
SHOWN_PER_FILE = 5
"""Number of wrong lines that are reported per file. A file of another format is wrong in every line."""

_log = logging.getLogger(__name__)


class TaskOptions(BaseModel):
    """One task: its rows and its linear head.

    Attributes:
        data: Files of rows to score on.
        head: File of the head.
        train: Files of rows to fit on.
        text: The field of the text.
        label: The field of the label.
        labels: Names of the classes in their order, or a JSON file with such a list, alone or under ``labels``.
        pooling: How the hidden states of a text become one vector: their mean, or that of the first token (``cls``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[PathList, Field(min_length=1)]
    head: str
    train: PathList = []
    text: str = "text"
    label: str = "label"
    labels: Any = None
    pooling: Literal["mean", "cls"] = "mean"

    @field_validator("labels")
    @classmethod
    def _names_or_file(cls, value: object) -> object:
        is_list = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not (value is None or isinstance(value, str) or is_list):
            raise ValueError("must be a list of names or a JSON file that has one under 'labels'")
        return value


class Options(BaseModel):
    """An ``evaluate`` entry of the study file, without ``evaluator``.

    Attributes:
        tasks: Options of each task by its name.
        include_path: Folders of the tasks' files; none: the folder of the study file.
        batch_size: Texts of one forward pass.
        max_length: Most tokens per text.
        limit: Most documents per task: the first in the order of questions.
        fit: The source of the rows to fit on. ``auto``: `TaskOptions.train`, without it the fit share. ``test_inputs``:
            the texts of the test split without their labels, as in test-time adaptation (AdaMerging).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: Annotated[dict[Annotated[str, Field(pattern=r"^[^\s/]+$")], TaskOptions], Field(min_length=1)]
    include_path: PathList = []
    batch_size: Annotated[int, Field(ge=1)] = 64
    max_length: Annotated[int, Field(ge=1)] = 128
    limit: Annotated[int, Field(ge=1)] | None = None
    fit: Literal["auto", "test_inputs"] = "auto"


@dataclass(frozen=True)
class Row:
    """A question.

    Attributes:
        text: The text.
        label: The number of its class.
        hash: The hash of text and label.
    """

    text: str
    label: int
    hash: str


@dataclass(frozen=True)
class HeadFile:
    """A linear head on disk.

    Attributes:
        path: The safetensors file.
        sha256: The hash of the file.
        weight: The name of the tensor of shape (n_classes, hidden).
        bias: The name of the tensor of shape (n_classes,); None: there is none.
        n_classes: The number of classes.
        hidden: The hidden size of the encoder.
    """

    path: Path
    sha256: str
    weight: str
    bias: str | None
    n_classes: int
    hidden: int


@dataclass(frozen=True)
class TaskRows:
    """A task whose files have been read.

    Attributes:
        name: Its name.
        head: Its head file.
        pooling: See `TaskOptions`.
        scored: The rows of the search, validation and test split, each in the order of questions.
        fit: The rows to fit on. None of their texts is in `scored`, unless they have no labels.
        has_labels: Whether the rows to fit on have labels. Without, their `Row.label` is -1.
    """

    name: str
    head: HeadFile
    pooling: Literal["mean", "cls"]
    scored: Mapping[Split, tuple[Row, ...]]
    fit: tuple[Row, ...]
    has_labels: bool = True


def read_tasks(options: Options, shares: SplitShares, folder: Path | None = None) -> list[TaskRows]:
    """Read the headers of all heads and all rows, and split the rows.

    Args:
        options: The evaluator's options.
        shares: Shares of the splits.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Every problem of every task.
    """
    problems: list[str] = []
    tasks = [_Reader(options, name, problems, folder).read(shares) for name in options.tasks]
    if problems:
        raise StudyFileError(problems)
    return [t for t in tasks if t is not None]


class _Reader:
    """Reads one task. Adds what is wrong to `problems` and goes on."""

    def __init__(self, options: Options, name: str, problems: list[str], folder: Path | None) -> None:
        self.options, self.name, self.task = options, name, options.tasks[name]
        self.problems = problems
        self.folders = folders(options.include_path, folder)

    def read(self, shares: SplitShares) -> TaskRows | None:
        before = len(self.problems)
        names = self._labels()
        has_labels = len(self.problems) == before  # without names, every row that names its class would seem wrong
        head = self._head()
        n_classes = len(names) if names is not None else head.n_classes if head is not None else None
        if head is not None and n_classes is not None and head.n_classes != n_classes:
            self._note("head", f"{head.path} has {head.n_classes} classes, but labels names {n_classes}")
        rows = self._rows("data", self.task.data, names, n_classes) if has_labels else []
        train = self._rows("train", self.task.train, names, n_classes) if has_labels else []
        if head is None or len(self.problems) > before:
            return None
        is_unlabelled = self.options.fit == "test_inputs"
        if train or is_unlabelled:
            shares = replace(
                shares, fit=0.0
            )  # with rows of its own to fit on, a task can be scored on its whole search split
        split = self._split(rows, shares)
        self._check_sizes(split)
        if is_unlabelled:
            fit = tuple(Row(row.text, -1, hashlib.sha256(row.text.encode()).hexdigest()) for row in split[Split.TEST])
            return TaskRows(self.name, head, self.task.pooling, {s: split[s] for s in SCORED}, fit, has_labels=False)
        fit = self._disjoint(train if self.task.train else split[Split.FIT], [r for s in SCORED for r in split[s]])
        return TaskRows(self.name, head, self.task.pooling, {s: split[s] for s in SCORED}, fit)

    def _note(self, field: str, text: str) -> None:
        self.problems.append(f"tasks.{self.name}.{field}: {text}")

    def _file(self, field: str, text: str) -> Path | None:
        """The file that `text` names: an absolute path, or the file in the first of `folders` that has it."""
        candidates = [folder / Path(text).expanduser() for folder in self.folders]
        for path in candidates:
            if path.is_file():
                return path
        parent = candidates[0].parent
        known = [p.name for p in parent.iterdir() if p.is_file()] if parent.is_dir() else []
        self._note(
            field, f"no file {' or '.join(map(str, dict.fromkeys(candidates)))}{nearest(Path(text).name, known)}"
        )
        return None

    def _labels(self) -> list[str] | None:
        """The names of the classes; None if there are none, or if they cannot be read."""
        names = self.task.labels
        if isinstance(names, str):
            path = self._file("labels", names)
            if path is None:
                return None
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                self._note("labels", f"{path} is not JSON: {error}")
                return None
            names = data.get("labels") if isinstance(data, dict) else data
            if not isinstance(names, list) or not all(isinstance(v, str) for v in names):
                self._note("labels", f"{path} must be or have under 'labels' a list of names")
                return None
        if names is not None and len(set(names)) != len(names):
            self._note(
                "labels", f"names must differ, got {sorted({n for n in names if names.count(n) > 1})} more than once"
            )
        return list(names) if names is not None else None

    def _head(self) -> HeadFile | None:
        path = self._file("head", self.task.head)
        if path is None:
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            self._note("head", f"{path} is not a readable safetensors file: {error}")
            return None
        weights = [k for k, s in shapes.items() if k.split(".")[-1] == "weight" and len(s) == 2]
        biases = [k for k, s in shapes.items() if k.split(".")[-1] == "bias" and len(s) == 1]
        if len(weights) != 1 or len(weights) + len(biases) != len(shapes) or len(biases) > 1:
            self._note(
                "head",
                f"{path} must hold one 'weight' (n_classes, hidden) and at most one 'bias' (n_classes,), got {shapes}",
            )
            return None
        n_classes, hidden = shapes[weights[0]]
        if n_classes < 2 or (biases and shapes[biases[0]] != (n_classes,)):
            self._note(
                "head", f"{path}: weight {n_classes, hidden} and bias must agree on two or more classes, got {shapes}"
            )
            return None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return HeadFile(path, digest, weights[0], biases[0] if biases else None, n_classes, hidden)

    def _rows(self, field: str, files: Sequence[str], names: list[str] | None, n_classes: int | None) -> list[Row]:
        """The different rows of all files, in the order of the files."""
        rows: dict[str, Row] = {}
        for text in files:
            path = self._file(field, text)
            if path is None:
                continue
            wrong = []
            for line, item in _lines(path):
                row = item if isinstance(item, str) else self._row(item, names, n_classes)
                if isinstance(row, Row):
                    rows.setdefault(row.hash, row)
                else:
                    wrong.append(f"{path}, line {line}: {row}")
            for problem in wrong[:SHOWN_PER_FILE]:
                self._note(field, problem)
            if len(wrong) > SHOWN_PER_FILE:
                self._note(field, f"{path}: {len(wrong) - SHOWN_PER_FILE} more lines are wrong")
        return list(rows.values())

    def _row(self, item: Mapping[str, Any], names: list[str] | None, n_classes: int | None) -> Row | str:
        """The row, or a text that says what is wrong with it."""
        for key in (self.task.text, self.task.label):
            if key not in item:
                return f"no field {key!r}{nearest(key, item)}"
        text, label = item[self.task.text], item[self.task.label]
        if not isinstance(text, str) or not text.strip():
            return f"{self.task.text!r} must be a text that is not empty, got {text!r}"
        if isinstance(label, str):
            if names is None:
                return f"{self.task.label!r} is the name {label!r}: give the names' order under labels"
            if label not in names:
                return f"label {label!r} is not among labels{nearest(label, names)}"
            label = names.index(label)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < (n_classes or label + 1):
            top = f"to {n_classes - 1}" if n_classes else "upwards"
            return f"{self.task.label!r} must be a class from 0 {top}, got {label!r}"
        document = json.dumps([text, label], ensure_ascii=False)
        return Row(text, label, hashlib.sha256(document.encode()).hexdigest())

    def _split(self, rows: Sequence[Row], shares: SplitShares) -> dict[Split, tuple[Row, ...]]:
        """Rows by split. A text with several labels goes to the split of its smallest hash."""
        first: dict[str, str] = {}
        for row in rows:
            first[row.text] = min(row.hash, first.get(row.text, row.hash))
        ordered = sorted(rows, key=lambda r: (question_order(r.hash), r.hash))[: self.options.limit]
        split: dict[Split, list[Row]] = {s: [] for s in Split}
        for row in ordered:
            split[split_of(first[row.text], shares)].append(row)
        return {s: tuple(members) for s, members in split.items()}

    def _check_sizes(self, split: Mapping[Split, Sequence[Row]]) -> None:
        n = sum(map(len, split.values()))
        for name in SCORED:
            if len(split[name]) < 2:
                self._note(
                    "data",
                    f"the {name} split needs at least 2 documents for an error bar, got {len(split[name])} of {n}; "
                    "give more data, a larger share, or a larger limit",
                )

    def _disjoint(self, fit: Sequence[Row], scored: Sequence[Row]) -> tuple[Row, ...]:
        """The rows of `fit` whose text is not in `scored`: no scored text may be fitted on."""
        texts = {row.text for row in scored}
        kept = tuple(row for row in fit if row.text not in texts)
        n_left_out = len(fit) - len(kept)
        if fit and not kept:
            self._note("train", f"all texts of its {len(fit)} rows also stand in data, so there is nothing to fit on")
        elif n_left_out:
            _log.warning(
                "task %s: %d of %d rows to fit on are also questions: left out", self.name, n_left_out, len(fit)
            )
        return kept


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
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

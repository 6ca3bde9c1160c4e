"""Options, rows and splits of labelled questions with heads: everything that is known before a weight is loaded.

Imports no torch. Texts are here; `image_rows` has images.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator
from safetensors import SafetensorError, safe_open

from evaluators.labelled.rows import SCORED, LabelledTask, TaskReader, json_lines, read_all
from merge_search.errors import nearest
from merge_search.evaluation import Split, SplitShares
from merge_search.options import PathList

__all__ = [
    "HeadFile",
    "HeadReader",
    "HeadTask",
    "HeadTaskOptions",
    "Options",
    "Row",
    "TaskName",
    "TaskOptions",
    "class_of",
    "group_of",
    "read_tasks",
]

TaskName = Annotated[str, Field(pattern=r"^[^\s/]+$")]
FEWEST_IN_CELL = 2
"""Fewest questions of a split that a rate of a group is computed from."""
SHOWN_CELLS = 5


class HeadTaskOptions(BaseModel):
    """One task: its rows and its linear head.

    Attributes:
        data: Files of rows to score on.
        head: File of the head.
        train: Files of rows to fit on.
        label: The field of the label.
        labels: Names of the classes in their order, or a JSON file with such a list, alone or under ``labels``.
        pooling: How the hidden states of a question become one vector: their mean, or the first one (``cls``).
        group: The field of the group that a question belongs to; None: there are no groups.
        gaps: The differences between groups that are metrics of the task, where it has groups.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Annotated[PathList, Field(min_length=1)]
    head: str
    train: PathList = []
    label: str = "label"
    labels: Any = None
    pooling: Literal["mean", "cls"] = "mean"
    group: str | None = None
    gaps: Annotated[list[Literal["parity", "odds"]], Field(min_length=1)] = ["parity", "odds"]

    @field_validator("labels")
    @classmethod
    def _names_or_file(cls, value: object) -> object:
        is_list = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not (value is None or isinstance(value, str) or is_list):
            raise ValueError("must be a list of names or a JSON file that has one under 'labels'")
        return value


class TaskOptions(HeadTaskOptions):
    """One task of texts.

    Attributes:
        text: The field of the text.
    """

    text: str = "text"


class Options(BaseModel):
    """An ``evaluate`` entry of the study file, without ``evaluator``.

    Attributes:
        tasks: Options of each task by its name.
        include_path: Folders of the tasks' files; none: the folder of the study file.
        batch_size: Texts of one forward pass.
        max_length: Most tokens per text.
        limit: Most documents per task: the first in the order of questions.
        fit: The source of the rows to fit on. ``auto``: `TaskOptions.train`, without it the fit share. ``test_inputs``:
            the questions of the test split without their labels, as in test-time adaptation (AdaMerging).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: Annotated[dict[TaskName, TaskOptions], Field(min_length=1)]
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
        hash: The hash of text and label, and of the group where there is one.
        group: Its group; '' if the task has none.
    """

    text: str
    label: int
    hash: str
    group: str = ""

    @property
    def question(self) -> str:
        return self.text


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
class HeadTask(LabelledTask[Any]):
    """A task whose files have been read.

    Attributes:
        head: Its head file.
        pooling: See `HeadTaskOptions`.
        gaps: The differences between groups that are its metrics; none without groups.
    """

    head: HeadFile
    pooling: Literal["mean", "cls"]
    gaps: tuple[str, ...] = ()

    @property
    def n_outcomes(self) -> int:
        return self.head.n_classes

    def digest(self) -> dict[str, Any]:
        gaps = {"gaps": list(self.gaps)} if self.gaps else {}  # studies from before there were gaps keep theirs
        return {"head": self.head.sha256, "pooling": self.pooling, **gaps}


def read_tasks(options: Options, shares: SplitShares, folder: Path | None = None) -> list[HeadTask]:
    """Read the headers of all heads and all rows, and split the rows.

    Args:
        options: The evaluator's options.
        shares: Shares of the splits.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Every problem of every task.
    """
    return read_all(_TextReader, options, shares, folder, test_inputs=options.fit == "test_inputs")


Kind = TypeVar("Kind", bound=HeadTaskOptions)


class HeadReader(TaskReader[Any]):
    """Reads one task with a head: labels, head and groups. A subclass reads the rows of a file.

    Args:
        name: The task's name.
        task: The task's options.
        problems: As `TaskReader`; so are the others.
    """

    def __init__(self, name: str, task: HeadTaskOptions, problems: list[str], **at: Any) -> None:
        super().__init__(name, problems, **at)
        self.task = task

    @abstractmethod
    def rows_of(
        self, field: str, path: Path, names: list[str] | None, n_classes: int | None
    ) -> tuple[list[Any], list[str]]:
        """The rows of one file, and a sentence for each line of it that is none."""

    def read(self, shares: SplitShares) -> HeadTask | None:
        before = len(self.problems)
        names = self._labels()
        has_labels = len(self.problems) == before  # without names, every row that names its class would seem wrong
        head = self._head()
        n_classes = len(names) if names is not None else head.n_classes if head is not None else None
        if head is not None and n_classes is not None and head.n_classes != n_classes:
            self.note("head", f"{head.path} has {head.n_classes} classes, but labels names {n_classes}")
        rows = self._rows("data", self.task.data, names, n_classes) if has_labels else []
        train = self._rows("train", self.task.train, names, n_classes) if has_labels else []
        if head is None or len(self.problems) > before:
            return None
        scored, fit = self.split(rows, train, shares, has_train=bool(self.task.train))
        gaps = tuple(dict.fromkeys(self.task.gaps)) if self.task.group is not None else ()
        if gaps:
            self._check_groups(scored, gaps, head.n_classes)
        return HeadTask(self.name, scored, fit, head, self.task.pooling, gaps)

    def _labels(self) -> list[str] | None:
        """The names of the classes; None if there are none, or if they cannot be read."""
        names = self.task.labels
        if isinstance(names, str):
            path = self.file("labels", names)
            if path is None:
                return None
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                self.note("labels", f"{path} is not JSON: {error}")
                return None
            names = data.get("labels") if isinstance(data, dict) else data
            if not isinstance(names, list) or not all(isinstance(v, str) for v in names):
                self.note("labels", f"{path} must be or have under 'labels' a list of names")
                return None
        if names is not None and len(set(names)) != len(names):
            self.note(
                "labels", f"names must differ, got {sorted({n for n in names if names.count(n) > 1})} more than once"
            )
        return list(names) if names is not None else None

    def _head(self) -> HeadFile | None:
        path = self.file("head", self.task.head)
        if path is None:
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            self.note("head", f"{path} is not a readable safetensors file: {error}")
            return None
        weights = [k for k, s in shapes.items() if k.split(".")[-1] == "weight" and len(s) == 2]
        biases = [k for k, s in shapes.items() if k.split(".")[-1] == "bias" and len(s) == 1]
        if len(weights) != 1 or len(weights) + len(biases) != len(shapes) or len(biases) > 1:
            self.note(
                "head",
                f"{path} must hold one 'weight' (n_classes, hidden) and at most one 'bias' (n_classes,), got {shapes}",
            )
            return None
        n_classes, hidden = shapes[weights[0]]
        if n_classes < 2 or (biases and shapes[biases[0]] != (n_classes,)):
            self.note(
                "head", f"{path}: weight {n_classes, hidden} and bias must agree on two or more classes, got {shapes}"
            )
            return None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return HeadFile(path, digest, weights[0], biases[0] if biases else None, n_classes, hidden)

    def _rows(self, field: str, files: Sequence[str], names: list[str] | None, n_classes: int | None) -> list[Any]:
        """The different rows of all files, in the order of the files."""
        rows: dict[str, Any] = {}
        for text in files:
            path = self.file(field, text)
            if path is not None:
                found, wrong = self.rows_of(field, path, names, n_classes)
                for row in found:
                    rows.setdefault(row.hash, row)
                self.note_lines(field, path, wrong)
        return list(rows.values())

    def _check_groups(self, scored: Mapping[Split, Sequence[Any]], gaps: Sequence[str], n_classes: int) -> None:
        """Note groups, and for odds groups of one class, with too few questions of a split to compute a rate."""
        groups = sorted({row.group for rows in scored.values() for row in rows})
        if len(groups) < 2:
            self.note("group", f"needs at least two groups under {self.task.group!r}, found {groups}")
            return
        few = []
        for split in SCORED:
            cells = Counter((row.group, row.label) for row in scored[split])
            for g in groups:
                if "odds" in gaps:
                    few += [f"{split} {g!r} {c}" for c in range(n_classes) if cells[g, c] < FEWEST_IN_CELL]
                elif sum(cells[g, c] for c in range(n_classes)) < FEWEST_IN_CELL:
                    few.append(f"{split} {g!r}")
        if few:
            of = "group and class" if "odds" in gaps else "group"
            less = ", or leave the odds out (gaps: [parity])" if "odds" in gaps else ""
            self.note(
                "group",
                f"every split needs at least {FEWEST_IN_CELL} questions of every {of}, too few in {len(few)}: "
                f"{', '.join(few[:SHOWN_CELLS])}{', ...' if len(few) > SHOWN_CELLS else ''}; "
                f"give more data{less}",
            )


class _TextReader(HeadReader):
    """Reads JSON lines with a text and a label."""

    task: TaskOptions

    def rows_of(
        self, field: str, path: Path, names: list[str] | None, n_classes: int | None
    ) -> tuple[list[Row], list[str]]:
        rows, wrong = [], []
        for line, item in json_lines(path):
            row = item if isinstance(item, str) else self._row(item, names, n_classes)
            if isinstance(row, Row):
                rows.append(row)
            else:
                wrong.append(f"{path}, line {line}: {row}")
        return rows, wrong

    def _row(self, item: Mapping[str, Any], names: list[str] | None, n_classes: int | None) -> Row | str:
        """The row, or a text that says what is wrong with it."""
        for key in (self.task.text, self.task.label, *([] if self.task.group is None else [self.task.group])):
            if key not in item:
                return f"no field {key!r}{nearest(key, item)}"
        text = item[self.task.text]
        if not isinstance(text, str) or not text.strip():
            return f"{self.task.text!r} must be a text that is not empty, got {text!r}"
        label = class_of(item[self.task.label], self.task.label, names, n_classes)
        if isinstance(label, str):
            return label
        field = self.task.group
        group = "" if field is None else group_of(item[field])
        if group is None:
            return f"{field!r} must be a text, a whole number or true or false, got {item[field or '']!r}"
        document = json.dumps([text, label, *([group] if group else [])], ensure_ascii=False)
        return Row(text, label, hashlib.sha256(document.encode()).hexdigest(), group)


def class_of(label: object, field: str, names: Sequence[str] | None, n_classes: int | None) -> int | str:
    """The number of a class from its number or name, or a text that says what is wrong with it."""
    if isinstance(label, str):
        if names is None:
            return f"{field!r} is the name {label!r}: give the names' order under labels"
        if label not in names:
            return f"label {label!r} is not among labels{nearest(label, names)}"
        return list(names).index(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < (n_classes or label + 1):
        top = f"to {n_classes - 1}" if n_classes else "upwards"
        return f"{field!r} must be a class from 0 {top}, got {label!r}"
    return label


def group_of(value: object) -> str | None:
    """A group's name from a field's value; None if it is no name."""
    if isinstance(value, str):
        return value.strip() or None
    return json.dumps(value) if isinstance(value, int) else None

"""The rows of a task that a learner may fit on: its own training split, or the fit share of its questions."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lm_eval.utils import handle_non_serializable, hash_string

from evaluators.isolation import isolated_generators
from evaluators.lm_eval._compat import data_of
from evaluators.lm_eval.answers import delimiter
from evaluators.lm_eval.grading import is_right, is_short, problem_of_gold
from evaluators.lm_eval.options import LmEvalOptions
from evaluators.lm_eval.questions import TaskQuestions
from evaluators.lm_eval.scores import right_choices
from evaluators.lm_eval.tasks import quiet_lm_eval, reason
from merge_search.errors import EvaluationError, StudyFileError
from merge_search.evaluation import Split, question_order

if TYPE_CHECKING:
    from evaluators.distillation import TeacherOutputs

__all__ = ["LOSSES", "FitRow", "FitRows", "Source", "fit_source", "losses_of"]

log = logging.getLogger(__name__)

LOSSES = ("gold", "pseudo", "kl", "entropy", "choice", "correct")

Source = Literal["train", "search", "test_inputs", "none"]
"""The source of a task's rows to fit on: its training split, the fit share of its questions, the test questions without
their right answers, or none."""

N_HASHED = 50_000
"""Most rows of a training split that are hashed, which takes seconds. Of a larger split every k-th row is taken."""

N_JUDGED = 16
"""Most rows on which a task's gold text is judged. A text like ``0`` is right by chance on a few rows, not on all."""

N_DIGEST = 100_000
"""Most rows of a training split that its digest reads, evenly spaced."""


@dataclass(frozen=True)
class FitRow:
    """A row to fit on.

    Attributes:
        id: The hash of the document.
        doc: The document.
    """

    id: str
    doc: Any


def fit_source(task: Any, option: Literal["auto", "train", "search", "test_inputs"]) -> Source:
    """The source of a loaded task's rows to fit on under the option `fit`."""
    if option in ("search", "test_inputs"):
        return option
    if _own_training_split(task) is not None:
        return "train"
    return "search" if option == "auto" else "none"


def losses_of(output_type: str) -> tuple[str, ...]:
    """Kinds of loss of tasks with an output type of lm-eval.

    ``choice`` needs choices. ``pseudo`` and ``entropy`` need an answer of the model's own, ``correct`` one in words.
    """
    without: tuple[str, ...] = () if output_type == "multiple_choice" else ("choice",)
    if output_type != "generate_until":
        without = (*without, "correct")
    if output_type not in ("multiple_choice", "generate_until"):
        without = (*without, "pseudo", "entropy")
    return tuple(kind for kind in LOSSES if kind not in without)


def _own_training_split(task: Any) -> str | None:
    """The name of the task's training split; None if it has none or is scored on it."""
    split: str | None = task.get_config("training_split")
    scored = task.get_config("test_split") or task.get_config("validation_split")
    if not task.has_training_docs() or split is None or split == scored:
        return None
    return split if split in data_of(task) else None


class FitRows:
    """The rows to fit on of one task, read on first use.

    Rows come in the order of questions (by hash). They are disjoint from all scored questions, by document and also by
    prompt and answer. Rows of a multiple-choice task without a right choice are left out. With the source
    ``test_inputs`` the rows are the test questions themselves, and their right answers are never read.

    Attributes:
        pseudo: Answers to learn by row, for the loss ``pseudo``.
        answers: The teacher's generated text per row (generation tasks only).
        teacher_outputs: The teacher's output distributions per row.

    Args:
        questions: The task, its questions already split.
        source: See `fit_source`.
        limit: Most rows to keep.
        options: The evaluator's options.
    """

    def __init__(self, questions: TaskQuestions, source: Source, limit: int, options: LmEvalOptions) -> None:
        self.name = questions.name
        self.task = questions.task
        self.source = source
        self.pseudo: dict[int, Any] = {}
        self.answers: dict[int, str] = {}
        self.teacher_outputs: dict[int, TeacherOutputs] = {}
        self._questions = questions.questions
        self._limit = limit
        self._metric = questions.metrics[0]
        self._options = options.for_task(self.name)
        self.target = options.target_of(self.name)

    @property
    def has_labels(self) -> bool:
        """Whether the right answers may be read."""
        return self.source != "test_inputs"

    @property
    def losses(self) -> tuple[str, ...]:
        """Kinds of loss that the rows have. Without labels a task that scores a given text has none: the text is one.

        Nor has a multiple-choice task whose choices stand in the prompt, since lm-eval keeps their common ending where
        other tasks have the right answer.
        """
        kinds = losses_of(self.task.OUTPUT_TYPE)
        if self.has_labels:
            without = {"gold"} if self.problem_of_gold else set()
            without |= set() if self.can_be_graded else {"correct"}
            return tuple(k for k in kinds if k not in without)
        answers = "pseudo" in kinds and not getattr(self.task, "multiple_input", 0)
        return tuple(k for k in kinds if answers and k not in ("gold", "choice", "correct"))

    @cached_property
    def problem_of_gold(self) -> str | None:
        """Why the loss ``gold`` is not offered; None if it is. Only tasks that generate are judged."""
        if not self._generates_with_labels or not self._sample:
            return None
        delimiters = [delimiter(self.task, doc, "x", self._options) for doc in self._sample]
        problem = problem_of_gold(self.task, self._metric, self._sample, delimiters, self.target)
        return problem and f"{problem}; task_options.{self.name}.target names another text"

    @cached_property
    def can_be_graded(self) -> bool:
        """Whether the task's main metric has full marks, so that it can tell which answers are right."""
        if not self._generates_with_labels or not self._sample:
            return False
        try:
            with isolated_generators(0), quiet_lm_eval():
                return is_right(self.task, self._metric, self._sample[0], "0") is not None
        except Exception:  # a task's own filters and functions
            return False

    @property
    def auto(self) -> str:
        """The loss that ``auto`` stands for: ``gold`` where it is right and short, else ``correct``, else ``kl``.

        A text or a choice that the task gives is right, whatever its length.
        """
        has = self.losses
        if "gold" in has and (
            self.task.OUTPUT_TYPE != "generate_until"
            or not self._sample
            or not self.can_be_graded
            or is_short(self.task, self._sample, self.target)
        ):
            return "gold"
        return "correct" if "correct" in has else "kl"

    def right_rows(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` whose answer in `pseudo` gets full marks of the task's main metric."""
        with isolated_generators(0), quiet_lm_eval():
            return [
                i
                for i, row in zip(rows, self.select(rows), strict=True)
                if is_right(self.task, self._metric, row.doc, self.pseudo[i])
            ]

    @property
    def _generates_with_labels(self) -> bool:
        return self.has_labels and self.task.OUTPUT_TYPE == "generate_until"

    @property
    def _sample(self) -> list[Any]:
        """The documents on which the gold text is judged."""
        return [row.doc for row in self.rows[:N_JUDGED]]

    @cached_property
    def rows(self) -> list[FitRow]:
        """The rows. Raises `StudyFileError` if the task's own code cannot read or render them."""
        try:
            with isolated_generators(0), quiet_lm_eval():
                return self._read()
        except Exception as error:  # templates, Python code and data of somebody else
            raise StudyFileError(
                f"task {self.name!r}: the rows to fit on ({self._where()}) cannot be read: {reason(error)}; "
                "set fit: search to fit on a share of its questions instead"
            ) from error

    def digest(self) -> str:
        """A hash of the training split's content, computed without the task's code; of other sources their name."""
        if self.source != "train":
            return self.source
        data = data_of(self.task)[_own_training_split(self.task)]
        sample = data[:: max(1, math.ceil(len(data) / N_DIGEST))]
        text = json.dumps([self._limit, len(data), sample], sort_keys=True, default=handle_non_serializable)
        return hashlib.sha256(text.encode()).hexdigest()

    def select(self, rows: Sequence[int]) -> list[FitRow]:
        """These rows. Raises `EvaluationError` unless there are some and the task has all of them."""
        n = len(self.rows)
        if not len(rows) or not 0 <= min(rows) <= max(rows) < n:
            asked = f"{min(rows)} to {max(rows)}" if len(rows) else "none"
            raise EvaluationError(
                f"task {self.name!r} has {n} rows to fit on (its training_split, or the fit share of its questions), "
                f"asked for {asked}"
            )
        return [self.rows[i] for i in rows]

    def _where(self) -> str:
        wheres = {"train": "its training_split", "test_inputs": "the inputs of its test questions"}
        return wheres.get(self.source, "the fit share of its questions")

    def _candidates(self) -> list[FitRow]:
        """The different documents in the order of questions."""
        if self.source in ("search", "test_inputs"):
            split = Split.FIT if self.source == "search" else Split.TEST
            return [FitRow(q.id, q.doc) for q in self._questions if q.split is split]
        docs = self.task.training_docs() if self.source == "train" else []
        by_id: dict[str, FitRow] = {}
        for i in range(0, len(docs), max(1, math.ceil(len(docs) / N_HASHED))):
            text = json.dumps(docs[i], indent=2, default=handle_non_serializable, ensure_ascii=False)
            row = FitRow(hash_string(text), docs[i])
            by_id.setdefault(row.id, row)
        return sorted(by_id.values(), key=lambda r: (question_order(r.id), r.id))

    def _read(self) -> list[FitRow]:
        candidates = self._candidates()
        if not candidates or not self.has_labels:
            return candidates[: self._limit]
        scored = [q for q in self._questions if q.split is not Split.FIT]
        ids, shown = {q.id for q in scored}, {self._shown(q.doc) for q in scored}
        kept: list[FitRow] = []
        n_scored = n_without = 0
        for row in candidates:
            if row.id in ids or self._shown(row.doc) in shown:
                n_scored += 1
            elif self.task.OUTPUT_TYPE == "multiple_choice" and not right_choices(self.task, row.doc):
                n_without += 1
            else:
                kept.append(row)
                if len(kept) == self._limit:
                    break
        if n_scored:
            log.warning("task %r: %d rows to fit on are also questions: left out", self.name, n_scored)
        if n_without:
            log.warning("task %r: %d rows to fit on have no right choice: left out", self.name, n_without)
        return kept

    def _shown(self, doc: Any) -> tuple[str, str, str]:
        """The prompt, the choices and the right answer."""
        choices = self.task.doc_to_choice(doc) if self.task.OUTPUT_TYPE == "multiple_choice" else None
        return str(self.task.doc_to_text(doc)), str(choices), str(self.task.doc_to_target(doc))

"""The judge of questions with one right answer out of a task's fixed list: batches, fidelities, losses to fit on.

A member of the family says what its rows are, how a live model gives logits over the answers, and which metrics follow
from them. Everything else is here. A learner fits on the rows of a task's ``train`` files or, without them, on the fit
share of the search split. `LabelledEvaluator.loss` is differentiable in the live model's parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from evaluators.labelled.rows import LabelledTask
from merge_search.errors import EvaluationError, InputError, nearest
from merge_search.evaluation import Cost, Evaluation, Evaluator, Scores, Split, window

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from evaluators.distillation import TeacherOutputs
    from evaluators.labelled.live import Batch, LiveOutputs

__all__ = ["LOSSES", "LabelledEvaluator", "mean_scores"]

LOSSES = ("gold", "pseudo", "kl", "entropy")

TaskKind = TypeVar("TaskKind", bound=LabelledTask[Any])


class LabelledEvaluator(Evaluator, Generic[TaskKind]):
    """An `Evaluator` that is `Teachable`. `bind` imports torch.

    Args:
        tasks: The tasks, their files read.
        batch_size: Questions of one forward pass.

    Determinism: Equal weights on one device give equal answers. Batches depend on the questions alone, dropout is off,
    and global random generators are not used.
    """

    def __init__(self, tasks: Sequence[TaskKind], *, batch_size: int) -> None:
        self._tasks = {t.name: t for t in tasks}
        self._batch_size = batch_size
        self.n_asked = 0
        self._live: LiveOutputs[Any] | None = None
        self._items: dict[tuple[str, Split], list[Any]] = {}
        self._batches: dict[tuple[str, Split, int, int], list[Batch]] = {}
        self._pseudo: dict[str, dict[int, int]] = {name: {} for name in self._tasks}
        self._teacher_outputs: dict[str, dict[int, TeacherOutputs]] = {name: {} for name in self._tasks}

    @abstractmethod
    def _load(self, model: Any, tokenizer: Any, folder: str) -> LiveOutputs[Any]:
        """The live model's side. Raises `StudyFileError` where the model does not fit the tasks."""

    @abstractmethod
    def _scores(self, task: TaskKind, rows: Sequence[Any], logits: NDArray[np.float32]) -> dict[str, Scores]:
        """The task's metrics by name (``task/metric``) from logits of shape (n, n_outcomes)."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What all tasks' answers depend on besides `LabelledTask.digest`, with a version, as JSON."""

    def fingerprint(self) -> str:
        """sha256 of everything besides the weights that an answer depends on: documents, and what the tasks add."""
        content = {
            name: {
                **task.digest(),
                "scored": {str(split): [row.hash for row in rows] for split, rows in task.scored.items()},
                "fit": [row.hash for row in task.fit],
            }
            for name, task in self._tasks.items()
        }
        text = json.dumps({**self._settings(), "tasks": content}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Prepare every question once for a live model.

        Raises:
            StudyFileError: The model does not fit the tasks, or a question is none to it.
        """
        live = self._load(model, tokenizer, folder)
        self._items, self._batches = {}, {}
        for name, task in self._tasks.items():
            for split, rows in {**task.scored, Split.FIT: task.fit}.items():
                self._items[name, split] = live.encode(rows, where=f"task {name!r}, {split} split")
        self._live = live

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Score the bound model on `window(n, fidelity, after)` of each task's questions.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: No model is bound, the split is not scored, or the model failed. Out-of-memory errors pass.
        """
        live = self._bound()
        if split is Split.FIT:
            raise EvaluationError("the fit split is not scored; choose search, validation or test")
        began = time.perf_counter()
        scores: dict[str, Scores] = {}
        n_questions = 0
        for name, task in self._tasks.items():
            asked = window(len(task.scored[split]), fidelity, after)
            rows = task.scored[split][asked]
            key = (name, split, asked.start, asked.stop)
            if key not in self._batches:
                self._batches[key] = live.batches(self._items[name, split][asked], size=self._batch_size)
            scores |= self._scores(task, rows, live.score(name, self._batches[key], on_asked=self._count))
            n_questions += len(rows)
        return Evaluation(split, fidelity, scores, Cost(evaluate_s=time.perf_counter() - began, questions=n_questions))

    def _count(self, questions: int) -> None:
        self.n_asked += questions

    def fit_tasks(self) -> dict[str, int]:
        """Number of rows to fit on by task. None of them is ever scored."""
        return {name: len(task.fit) for name, task in self._tasks.items()}

    def predict(self, task: str, rows: Sequence[int]) -> list[int]:
        """The answer that the bound model, as it is now, gives to each of these rows to fit on.

        Raises:
            NonFiniteError: As `evaluate`.
            EvaluationError: As `evaluate`, and for an unknown task or row.
        """
        return [int(c) for c in self._logits(task, rows).argmax(axis=1)]

    def _logits(self, task: str, rows: Sequence[int]) -> NDArray[np.float32]:
        """Logits of rows to fit on, without a graph. Shape (rows, n_outcomes)."""
        live, known = self._bound(), self._fit_rows(task, rows)
        items = [self._items[known.name, Split.FIT][i] for i in rows]
        return live.score(known.name, live.batches(items, size=self._batch_size))

    def cache_teacher(self, task: str, rows: Sequence[int]) -> None:
        """Store how the bound model, as it is now, answers these rows of `task`, for the loss ``kl``.

        Rows that are not named keep what was stored for them.

        Raises:
            NonFiniteError: As `predict`.
            EvaluationError: As `predict`.
        """
        from torch import from_numpy

        from evaluators.distillation import TeacherOutputs

        whole = TeacherOutputs.from_log_p(from_numpy(self._logits(task, rows)).log_softmax(-1))
        self._teacher_outputs[task] |= {row: whole[at : at + 1] for at, row in enumerate(rows)}

    def teacher_questions(self, task: str) -> int:
        """One question per row."""
        return 1

    def set_pseudo_labels(self, task: str, labels: Mapping[int, int]) -> None:
        """Store answers by row for the loss ``pseudo``: usually what the task's teacher predicts.

        Rows that are not named keep their answers.

        Raises:
            EvaluationError: An unknown row, or no such answer.
        """
        known = self._fit_rows(task, list(labels))
        if wrong := {row: c for row, c in labels.items() if not 0 <= c < known.n_outcomes}:
            row, label = next(iter(wrong.items()))
            raise EvaluationError(
                f"task {task!r}: pseudo labels must be classes from 0 to {known.n_outcomes - 1}, "
                f"got {label} for row {row}"
            )
        self._pseudo[task] |= {row: int(c) for row, c in labels.items()}

    def losses(self, task: str) -> tuple[str, ...]:
        """Kinds of `loss`. They are the same for every task; without labels there is no ``gold``."""
        return LOSSES if self._tasks[task].has_labels else LOSSES[1:]

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Tensor:
        """Mean loss of the bound model on these rows, with a graph to the parameters that require gradients.

        Args:
            task: A key of `fit_tasks`.
            rows: Numbers below ``fit_tasks()[task]``, in any order, repeats allowed. They are batched by length only.
            kind: ``gold``: cross-entropy to the rows' labels. ``pseudo``: cross-entropy to the labels of
                `set_pseudo_labels`. ``kl``: KL(teacher || live) over the answers, in nats. ``entropy``: entropy of the
                prediction divided by log(n_outcomes), in [0, 1] (AdaMerging, arXiv 2310.02575. Differs: divided, so
                that tasks of many classes do not dominate).

        Returns:
            Scalar, float32, on the model's device.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: Unknown task or row, a row without a label, or the model failed. Out-of-memory errors pass.
            InputError: Unknown kind.

        Cost: One forward pass. Its activations are kept for the backward pass.
        """
        from torch import as_tensor, cat
        from torch.nn import functional

        from evaluators.distillation import divergence, join

        live, known = self._bound(), self._fit_rows(task, rows)
        if kind not in LOSSES:
            raise InputError(f"no loss is called {kind!r}{nearest(kind, LOSSES)}")
        if kind not in self.losses(task):
            raise InputError(
                f"task {task!r} is fitted on its test questions, whose labels are never read: it has no {kind} loss, "
                f"only {', '.join(self.losses(task))}"
            )
        self._check_teacher(task, rows, kind)
        items = self._items[task, Split.FIT]
        batches = live.trim_batches([items[i] for i in rows])
        logits = cat([live.logits(task, batch) for batch in batches])
        asked = [rows[at] for batch in batches for at in batch.rows]
        if kind == "kl":
            return divergence(join([self._teacher_outputs[task][i] for i in asked]), logits.log_softmax(-1)).mean()
        if kind == "entropy":
            log_p = functional.log_softmax(logits, dim=-1)
            return -(log_p.exp() * log_p).sum(-1).mean() / math.log(known.n_outcomes)
        labels = [self._pseudo[task][i] if kind == "pseudo" else known.fit[i].label for i in asked]
        return functional.cross_entropy(logits, as_tensor(labels, device=logits.device))

    def answers(self, task: str, row: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy to every answer, with a graph, and its probability. Shape (n_outcomes,) each."""
        live, known = self._bound(), self._fit_rows(task, [row])
        (batch,) = live.trim_batches([self._items[known.name, Split.FIT][row]])
        log_p = live.logits(task, batch)[0].log_softmax(-1)
        return -log_p, log_p.detach().exp()

    def _check_teacher(self, task: str, rows: Sequence[int], kind: str) -> None:
        """Raise `EvaluationError` if the loss needs a teacher's answers and some of these rows have none."""
        if kind == "pseudo" and (absent := [i for i in rows if i not in self._pseudo[task]]):
            raise EvaluationError(
                f"task {task!r} has no pseudo labels for {len(absent)} of {len(rows)} rows (row {absent[0]}): "
                "give them to set_pseudo_labels first"
            )
        if kind == "kl" and (absent := [i for i in rows if i not in self._teacher_outputs[task]]):
            raise EvaluationError(
                f"task {task!r} has no teacher's answers to compare with for {len(absent)} of {len(rows)} rows "
                f"(row {absent[0]}): call cache_teacher first"
            )

    def _bound(self) -> LiveOutputs[Any]:
        if self._live is None:
            raise EvaluationError("no model is bound: call bind before asking for scores or losses")
        return self._live

    def _fit_rows(self, task: str, rows: Sequence[int]) -> TaskKind:
        """The task. Raises `EvaluationError` unless there are rows and the task has all of them."""
        if task not in self._tasks:
            raise EvaluationError(f"no task is called {task!r}{nearest(task, self._tasks)}")
        n = len(self._tasks[task].fit)
        if not rows or not 0 <= min(rows) <= max(rows) < n:
            asked = f"{min(rows)} to {max(rows)}" if rows else "none"
            raise EvaluationError(
                f"task {task!r} has {n} rows to fit on (its train file, or the fit share of its data), "
                f"asked for {asked}"
            )
        return self._tasks[task]


def mean_scores(
    ids: tuple[str, ...], values: NDArray[np.float64], probability: NDArray[np.float64] | None = None
) -> Scores:
    """Scores of a metric that is the mean of its questions' values. Shape (n,), n >= 2."""
    stderr = float(values.std(ddof=1) / math.sqrt(len(values)))
    return Scores(ids, values, float(values.mean()), stderr, probability)

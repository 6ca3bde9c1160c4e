"""Text classification by an encoder with one linear head per task: the encoders merge, the heads stay.

    evaluate:
      - evaluator: classification
        include_path: data/                      # folder of data, train, labels and head; default: the study file's
        tasks:
          sst2: {data: [sst2/val.jsonl, sst2/test.jsonl], train: sst2/train.jsonl, head: sst2/head.safetensors}
          trec6: {data: trec6/test.jsonl, head: trec6/head.safetensors, labels: trec6/task.json, pooling: mean}
        batch_size: 64
        max_length: 128
        limit: 500                               # most documents per task: the first in the order of questions

Rows are JSON lines with a text and a label (a class number, or a name listed under ``labels``). A head file holds
``weight`` (n_classes, hidden) and ``bias`` (n_classes,). Each task has two metrics: ``acc``, with the right label's
probability beside it, and ``nll``, the mean of -log(probability).

A learner fits on the rows of ``train`` or, without them, on the fit share of the search split. `Classification.loss` is
differentiable in the live model's parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.classification.rows import Options, Row, TaskRows, read_tasks
from merge_search.errors import EvaluationError, InputError, StudyFileError, nearest
from merge_search.evaluation import Cost, Evaluation, Evaluator, MetricInfo, Scores, Split, SplitShares, window
from merge_search.options import read_options

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from evaluators.classification.heads import Batch, EncoderHeads
    from evaluators.distillation import TeacherOutputs

__all__ = ["Classification"]

LOSSES = ("gold", "pseudo", "kl", "entropy")


class Classification(Evaluator):
    """Accuracy and likelihood of an encoder with fixed heads: an `Evaluator` that is `Teachable`. `bind` imports torch.

    Args:
        options: See the module's docstring.
        shares: Shares of the splits. The fit share of a task with ``train`` rows is scored with the rest of its search
            split.
        seed: Not used. Splits and orders are functions of the documents.
        folder: The folder that relative paths are relative to; None: the current directory.

    Raises:
        StudyFileError: Everything that is wrong with options, files, labels, rows, heads and the sizes of the splits.

    Determinism: Equal weights on one device give equal answers. Batches depend on the questions alone, dropout is off,
    and global random generators are not used.
    """

    def __init__(
        self, options: Mapping[str, Any], *, shares: SplitShares, seed: int, folder: Path | None = None
    ) -> None:
        self._options = read_options(Options, options)
        self._tasks = {t.name: t for t in read_tasks(self._options, shares, folder)}
        self.n_asked = 0
        self._encoder: EncoderHeads | None = None
        self._tokens: dict[tuple[str, Split], list[list[int]]] = {}
        self._batches: dict[tuple[str, Split, int, int], list[Batch]] = {}
        self._pseudo: dict[str, dict[int, int]] = {name: {} for name in self._tasks}
        self._teacher_outputs: dict[str, dict[int, TeacherOutputs]] = {name: {} for name in self._tasks}

    def metrics(self) -> list[MetricInfo]:
        """``acc`` and ``nll`` of each task. The chance of ``acc`` is 1 / n_classes."""
        out = []
        for name, task in self._tasks.items():
            n = {split: len(rows) for split, rows in task.scored.items()}
            out.append(MetricInfo(name, "acc", True, n, chance=1 / task.head.n_classes))
            out.append(MetricInfo(name, "nll", False, n))
        return out

    def fingerprint(self) -> str:
        """sha256 of everything besides the weights that an answer depends on: documents, heads, pooling, max_length."""
        content = {
            name: {
                "head": task.head.sha256,
                "pooling": task.pooling,
                "scored": {str(split): [row.hash for row in rows] for split, rows in task.scored.items()},
                "fit": [row.hash for row in task.fit],
            }
            for name, task in self._tasks.items()
        }
        text = json.dumps({"version": 1, "max_length": self._options.max_length, "tasks": content}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_model(self, config: Mapping[str, Any], what: str) -> None:
        """Compare the hidden size of the heads with a model's.

        Raises:
            StudyFileError: Heads of another hidden size.
        """
        size = config.get("hidden_size")
        odd = [t for t in self._tasks.values() if isinstance(size, int) and t.head.hidden != size]
        if odd:
            raise StudyFileError(
                [
                    f"tasks.{t.name}.head: {t.head.path} has hidden size {t.head.hidden}, and {what} has {size}: it "
                    "cannot be judged; leave it out, or give a model of that width"
                    for t in odd
                ]
            )

    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Load the heads onto the model's device and tokenise every question once.

        Args:
            model: Called with ``input_ids`` and ``attention_mask``. Its output must have ``last_hidden_state``.
            tokenizer: The model's tokenizer.
            folder: Not used.

        Raises:
            StudyFileError: A head does not fit the encoder, or a text has no token.
        """
        from evaluators.classification.heads import EncoderHeads

        encoder = EncoderHeads(model, tokenizer, list(self._tasks.values()), max_length=self._options.max_length)
        self._tokens = {}
        self._batches = {}
        for name, task in self._tasks.items():
            for split, rows in {**task.scored, Split.FIT: task.fit}.items():
                self._tokens[name, split] = encoder.encode(
                    [r.text for r in rows], where=f"task {name!r}, {split} split"
                )
        self._encoder = encoder

    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Score the bound model on `window(n, fidelity, after)` of each task's questions.

        Raises:
            NonFiniteError: NaN or infinity among the logits.
            EvaluationError: No model is bound, the split is not scored, or the model failed. Out-of-memory errors pass.
        """
        encoder = self._bound()
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
                tokens = self._tokens[name, split][asked]
                self._batches[key] = encoder.batches(tokens, size=self._options.batch_size)
            scores |= _scores(name, rows, encoder.score(name, self._batches[key], on_asked=self._count))
            n_questions += len(rows)
        return Evaluation(split, fidelity, scores, Cost(evaluate_s=time.perf_counter() - began, questions=n_questions))

    def _count(self, questions: int) -> None:
        self.n_asked += questions

    def fit_tasks(self) -> dict[str, int]:
        """Number of rows to fit on by task. None of them is ever scored."""
        return {name: len(task.fit) for name, task in self._tasks.items()}

    def predict(self, task: str, rows: Sequence[int]) -> list[int]:
        """The class that the bound model, as it is now, gives to each of these rows to fit on.

        Raises:
            NonFiniteError: As `evaluate`.
            EvaluationError: As `evaluate`, and for an unknown task or row.
        """
        return [int(c) for c in self._logits(task, rows).argmax(axis=1)]

    def _logits(self, task: str, rows: Sequence[int]) -> NDArray[np.float32]:
        """Logits of rows to fit on, without a graph. Shape (rows, n_classes)."""
        encoder, known = self._bound(), self._fit_rows(task, rows)
        tokens = [self._tokens[known.name, Split.FIT][i] for i in rows]
        return encoder.score(known.name, encoder.batches(tokens, size=self._options.batch_size))

    def cache_teacher(self, task: str, rows: Sequence[int]) -> None:
        """Store how the bound model, as it is now, classifies these rows of `task`, for the loss ``kl``.

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
        """Store classes by row for the loss ``pseudo``: usually what the task's teacher predicts.

        Rows that are not named keep their classes.

        Raises:
            EvaluationError: An unknown row, or no such class.
        """
        known = self._fit_rows(task, list(labels))
        if wrong := {row: c for row, c in labels.items() if not 0 <= c < known.head.n_classes}:
            row, label = next(iter(wrong.items()))
            raise EvaluationError(
                f"task {task!r}: pseudo labels must be classes from 0 to {known.head.n_classes - 1}, "
                f"got {label} for row {row}"
            )
        self._pseudo[task] |= {row: int(c) for row, c in labels.items()}

    def losses(self, task: str) -> tuple[str, ...]:
        """Kinds of `loss`. They are the same for every task."""
        return LOSSES

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Tensor:
        """Mean loss of the bound model on these rows, with a graph to the parameters that require gradients.

        Args:
            task: A key of `fit_tasks`.
            rows: Numbers below ``fit_tasks()[task]``, in any order, repeats allowed. They are batched by length only.
            kind: ``gold``: cross-entropy to the rows' labels. ``pseudo``: cross-entropy to the labels of
                `set_pseudo_labels`. ``kl``: KL(teacher || live) over the classes, in nats. ``entropy``: entropy of the
                prediction divided by log(n_classes), in [0, 1] (AdaMerging, arXiv 2310.02575. Differs: divided, so that
                tasks of many classes do not dominate).

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

        encoder, known = self._bound(), self._fit_rows(task, rows)
        if kind not in LOSSES:
            raise InputError(f"no loss is called {kind!r}{nearest(kind, LOSSES)}")
        self._check_teacher(task, rows, kind)
        tokens = self._tokens[task, Split.FIT]
        batches = encoder.trim_batches([tokens[i] for i in rows])
        logits = cat([encoder.logits(task, batch) for batch in batches])
        asked = [rows[at] for batch in batches for at in batch.rows]
        if kind == "kl":
            return divergence(join([self._teacher_outputs[task][i] for i in asked]), logits.log_softmax(-1)).mean()
        if kind == "entropy":
            log_p = functional.log_softmax(logits, dim=-1)
            return -(log_p.exp() * log_p).sum(-1).mean() / math.log(known.head.n_classes)
        labels = [self._pseudo[task][i] if kind == "pseudo" else known.fit[i].label for i in asked]
        return functional.cross_entropy(logits, as_tensor(labels, device=logits.device))

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

    def _bound(self) -> EncoderHeads:
        if self._encoder is None:
            raise EvaluationError("no model is bound: call bind before asking for scores or losses")
        return self._encoder

    def _fit_rows(self, task: str, rows: Sequence[int]) -> TaskRows:
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


def _scores(task: str, rows: Sequence[Row], logits: NDArray[np.float32]) -> dict[str, Scores]:
    """Per-question ``acc`` and ``nll`` from logits of shape (n, n_classes). The lowest class wins a tie."""
    labels = np.array([row.label for row in rows])
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    right = shifted[np.arange(len(rows)), labels] - np.log(np.exp(shifted).sum(axis=1))
    correct = (logits.argmax(axis=1) == labels).astype(np.float64)
    ids = tuple(row.hash for row in rows)
    return {
        f"{task}/acc": Scores(ids, correct, float(correct.mean()), _stderr(correct), probability=np.exp(right)),
        f"{task}/nll": Scores(ids, -right, float(-right.mean()), _stderr(right)),
    }


def _stderr(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))

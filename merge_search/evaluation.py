"""Contract: an evaluator scores a live model on a split of the questions, at a fidelity.

Questions are split once, by a hash of the document, into search / validation / test, and put into one order,
also by hash: a fidelity of 0.5 asks the first half of that order, so questions of smaller fidelities are a
subset of those of larger ones and every comparison between candidates is paired.
"""

from __future__ import annotations

import base64
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from merge_search.errors import EvaluationError, MergeSearchError, NonFiniteError
from merge_search.memory import is_memory_error
from merge_search.seeding import unit_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Cost",
    "Differentiable",
    "Evaluation",
    "Evaluator",
    "MetricInfo",
    "Scores",
    "Split",
    "SplitShares",
    "Teachable",
    "asking",
    "loss_of",
    "pack",
    "question_order",
    "split_of",
    "unpack",
    "window",
]


class Split(StrEnum):
    """What a question is used for; each question belongs to exactly one."""

    FIT = "fit"  #: a learner fits its coefficients on these; never scored
    SEARCH = "search"  #: candidates are scored on these during the search
    VALIDATION = "validation"  #: the best few are compared on these afterwards
    TEST = "test"  #: opened once, for the report


@dataclass(frozen=True)
class SplitShares:
    """Shares of the questions; they sum to one. `fit` is 0 unless a learner needs part of the search split."""

    search: float = 0.6
    validation: float = 0.2
    test: float = 0.2
    fit: float = 0.0


def split_of(document_hash: str, shares: SplitShares) -> Split:
    """The split of a document: a function of its content alone, so equal documents share a split."""
    u = unit_interval("split", document_hash)
    if u < shares.search:
        return Split.FIT if u < shares.fit else Split.SEARCH
    return Split.VALIDATION if u < shares.search + shares.validation else Split.TEST


def question_order(document_hash: str) -> float:
    """Sort key of the nested order of questions, independent of the split."""
    return unit_interval("order", document_hash)


def window(n: int, fidelity: float, after: float = 0.0) -> slice:
    """Of n ordered questions, the first share `fidelity` without the first share `after`.

    Shares are rounded up, and to at least two questions, so that every score has an error bar.

    Raises:
        EvaluationError: unless 0 <= after < fidelity <= 1.
    """
    if not 0 <= after < fidelity <= 1:
        raise EvaluationError(f"must be 0 <= after < fidelity <= 1, got fidelity={fidelity}, after={after}")
    start, stop = (min(n, max(2, math.ceil(share * n - 1e-9))) if share else 0 for share in (after, fidelity))
    return slice(start, stop)


@dataclass(frozen=True)
class MetricInfo:
    """A metric of a task: ``task/metric`` is its name in objectives.

    Attributes:
        is_cost: A price and no skill (drift, seconds): no part of means over tasks or of retention, has no owner.
    """

    task: str
    metric: str
    higher_is_better: bool
    n_questions: Mapping[Split, int]
    chance: float | None = None
    is_cost: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}/{self.metric}"


@dataclass(frozen=True)
class Scores:
    """Per-question values of one metric.

    Attributes:
        ids: Document hashes, in the nested order of questions. Shape (n,).
        values: Score of each question. Shape (n,), float64, finite.
        probability: Probability given to the right answer, where the task is multiple choice. Shape (n,).
        score: The metric over all questions (a mean unless the metric aggregates otherwise).
        stderr: Its standard error.
        is_corrected: `score` was carried from a prefix of the questions to all of them; `stderr` says how surely.
    """

    ids: tuple[str, ...]
    values: NDArray[np.float64]
    score: float
    stderr: float
    probability: NDArray[np.float64] | None = None
    is_corrected: bool = False

    @property
    def is_mean(self) -> bool:
        """Whether `score` is the mean of `values` (up to how `pack` rounds them), so that parts can be joined."""
        return math.isclose(self.score, float(self.values.mean()), rel_tol=1e-3, abs_tol=1e-4)

    def joined(self, more: Scores) -> Scores:
        """These questions and `more` that come after them, for metrics that are means."""
        values = np.concatenate([self.values, more.values])
        both = self.probability is not None and more.probability is not None
        return Scores(
            ids=self.ids + more.ids,
            values=values,
            score=float(values.mean()),
            stderr=float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan,
            probability=np.concatenate([self.probability, more.probability]) if both else None,
        )


@dataclass(frozen=True)
class Cost:
    """What was spent: seconds of wall time, questions asked (a backward pass counts as two forwards)."""

    merge_s: float = 0.0
    evaluate_s: float = 0.0
    questions: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.merge_s + other.merge_s, self.evaluate_s + other.evaluate_s, self.questions + other.questions)


@dataclass(frozen=True)
class Evaluation:
    """Scores by metric name (``task/metric``) on one split at one fidelity."""

    split: Split
    fidelity: float
    scores: Mapping[str, Scores]
    cost: Cost = field(default_factory=Cost)

    def joined(self, more: Evaluation) -> Evaluation:
        """This prefix and the questions after it, as one evaluation; all its metrics must be means."""
        scores = {name: s.joined(more.scores[name]) for name, s in self.scores.items()}
        return Evaluation(self.split, more.fidelity, scores, self.cost + more.cost)

    def check_finite(self) -> None:
        """Raises `NonFiniteError` naming every metric whose score is not finite."""
        bad = [name for name, s in self.scores.items() if not (math.isfinite(s.score) and np.isfinite(s.values).all())]
        if bad:
            raise NonFiniteError(
                f"scores must be finite, got NaN or infinity for {', '.join(bad)} on the {self.split} split"
            )

    def to_attribute(self) -> dict[str, Any]:
        """Compact JSON for a trial's user attribute; `from_attribute` restores all but the question ids."""
        return {
            "split": str(self.split),
            "fidelity": self.fidelity,
            "cost": [self.cost.merge_s, self.cost.evaluate_s, self.cost.questions],
            "scores": {
                name: {
                    "score": s.score,
                    "stderr": s.stderr if math.isfinite(s.stderr) else None,
                    "n": len(s.values),
                    **({"is_corrected": True} if s.is_corrected else {}),
                    "values": pack(s.values),
                    **({} if s.probability is None else {"probability": pack(s.probability)}),
                }
                for name, s in self.scores.items()
            },
        }

    @classmethod
    def from_attribute(cls, data: Mapping[str, Any]) -> Evaluation:
        """Inverse of `to_attribute`; `Scores.ids` come back empty (they are the evaluator's fixed order)."""
        scores = {
            name: Scores(
                ids=(),
                values=unpack(s["values"]),
                score=s["score"],
                stderr=math.nan if s["stderr"] is None else s["stderr"],
                probability=unpack(s["probability"]) if "probability" in s else None,
                is_corrected=s.get("is_corrected", False),
            )
            for name, s in data["scores"].items()
        }
        return cls(Split(data["split"]), data["fidelity"], scores, Cost(*data["cost"]))


def pack(values: NDArray[np.float64]) -> str:
    """Numbers as text: ``b<n>:<base64>`` one bit each where all are 0 or 1, else ``e``/``f``: float16/float32.

    float16 is used for probabilities-like values in [0, 1] that are not all 0 or 1, float32 otherwise.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return f"b{len(values)}:" + base64.b64encode(np.packbits(values.astype(bool)).tobytes()).decode()
    kind, dtype = ("e", "<f2") if ((values >= 0) & (values <= 1)).all() else ("f", "<f4")
    return f"{kind}{len(values)}:" + base64.b64encode(values.astype(dtype).tobytes()).decode()


def unpack(text: str) -> NDArray[np.float64]:
    """Inverse of `pack`. Shape (n,), float64."""
    head, data = text.split(":", 1)
    raw, n = base64.b64decode(data), int(head[1:])
    if head[0] == "b":
        return np.unpackbits(np.frombuffer(raw, dtype=np.uint8), count=n).astype(np.float64)
    return np.frombuffer(raw, dtype="<f2" if head[0] == "e" else "<f4").astype(np.float64)


class Evaluator(Protocol):
    """Scores a live model: the contract of a class in ``evaluators/`` or in a user's own file.

    The class is built as ``Kind(options, shares=..., seed=..., folder=...)``. The constructor raises every problem with
    options, tasks or metrics at once, as one `StudyFileError`, before any weight is loaded. It leaves the global random
    generators alone.

    Inherit from this class to get its defaults. A class with the same methods that does not inherit is accepted, too:
    `merge_search.catalogue.build_evaluator` adds the defaults.

    Constructor arguments:
        options: The entry of the study file's ``evaluate`` list without the key ``evaluator``.
        shares: A `SplitShares`.
        seed: The study's seed.
        folder: The folder of the study file. Relative paths in `options` are relative to it.

    Attributes:
        n_asked: Number of questions that all calls of `evaluate` have put to the model so far, failed calls included.
            A failed call is charged the difference. An evaluator that leaves it at 0 is charged for completed calls only.
    """

    n_asked: int = 0

    @abstractmethod
    def metrics(self) -> list[MetricInfo]:
        """Every metric that `evaluate` will report, the main metric of each task first. Needs no bound model."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the questions, prompts or metrics change. Needs no bound model."""

    @abstractmethod
    def bind(self, model: Any, tokenizer: Any, *, folder: str) -> None:
        """Prepare the requests for a live model.

        Args:
            model: The live model. Its weights are changed in place between calls of `evaluate`.
            tokenizer: The model's tokenizer.
            folder: The folder of the base checkpoint.
        """

    @abstractmethod
    def evaluate(self, split: Split, fidelity: float = 1.0, *, after: float = 0.0) -> Evaluation:
        """Score the bound model as it is now on `window(n, fidelity, after)` of each task's n questions.

        Scoring the same weights twice gives the same answers. Global random generators are left as they were.

        Raises:
            EvaluationError: The model cannot be scored. The trial fails and the study goes on.
        """


@runtime_checkable
class Differentiable(Protocol):
    """What an `Evaluator` also has where a loss of the live model can be differentiated.

    The rows to fit on are a task's own training split where it has one, else the FIT share of its search split. No row
    to fit on is ever scored.

    Kinds of loss:
        gold: Negative log-likelihood of the right answer.
        pseudo: Negative log-likelihood of the answer that the task's teacher gives (see `set_pseudo_labels`).
        kl: Divergence from the teacher's output distribution (see `Teachable`).
        entropy: Entropy of the model's own answer.
    """

    def fit_tasks(self) -> dict[str, int]:
        """Number of rows to fit on by task; 0 for a task that has none."""
        ...

    def losses(self, task: str) -> tuple[str, ...]:
        """Kinds of loss that `task` has. Needs no bound model."""
        ...

    def predict(self, task: str, rows: Sequence[int]) -> list[Any]:
        """The live model's answers to these rows, in the form that `set_pseudo_labels` takes."""
        ...

    def set_pseudo_labels(self, task: str, labels: Mapping[int, Any]) -> None:
        """Store answers by row for losses of kind ``pseudo``. Rows that are not named keep their answers."""
        ...

    def loss(self, task: str, rows: Sequence[int], kind: str = "gold") -> Any:
        """Mean loss over these rows: a float32 scalar tensor with its graph through the live parameters.

        The model is in evaluation mode. Equal rows give equal losses. The caller decides which parameters require
        gradients.
        """
        ...


@runtime_checkable
class Teachable(Differentiable, Protocol):
    """A `Differentiable` with the loss ``kl``: the divergence from a teacher's outputs to the live model's. No labels."""

    def cache_teacher(self, task: str, rows: Sequence[int]) -> None:
        """Store the live model's outputs on these rows of `task`. The teacher's weights are loaded at this moment.

        Rows that are not named keep what was stored for them.
        """
        ...

    def teacher_questions(self, task: str) -> int:
        """Number of questions that `cache_teacher` asks per row."""
        ...


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Whatever an evaluator throws inside, a user's own too, ends the trial and not the study.

    Raises:
        EvaluationError: `what` failed, and how.
        MemoryError: for all ways in which torch says that there is none left.
        MergeSearchError: as it is.
    """
    try:
        yield
    except MergeSearchError:
        raise
    except Exception as error:
        if is_memory_error(error):
            raise MemoryError(str(error)) from error
        raise EvaluationError(f"{what} failed: {type(error).__name__}: {error}") from error


def loss_of(evaluator: Differentiable, task: str, kind: str = "gold") -> Callable[[Sequence[int]], Any]:
    """`Differentiable.loss` of a task as a function of the rows, inside `asking`."""

    def loss(rows: Sequence[int]) -> Any:
        with asking(f"task {task!r}: its loss"):
            return evaluator.loss(task, rows, kind=kind)

    return loss

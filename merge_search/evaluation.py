"""The contract of evaluators: an evaluator scores a live model on a split of the questions, at a fidelity.

A hash of each document decides which split its question belongs to and where it stands in the order of questions. A
fidelity of 0.5 asks the first half of that order. So the questions of a smaller fidelity are a subset of those of a
larger one, and every comparison between candidates is paired.

    >>> split_of("a document's hash", SplitShares())
    <Split.VALIDATION: 'validation'>
    >>> window(10, fidelity=0.5), window(10, fidelity=1.0, after=0.5)
    (slice(0, 5, None), slice(5, 10, None))
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
    "AnswerEnds",
    "Answering",
    "ChecksModels",
    "ChecksPrompts",
    "ComparesWithExperts",
    "Cost",
    "Counting",
    "Differentiable",
    "Evaluation",
    "Evaluator",
    "Generating",
    "Grading",
    "MetricInfo",
    "Scores",
    "Split",
    "SplitShares",
    "Teachable",
    "answers_of",
    "asking",
    "kind_of",
    "loss_of",
    "pack",
    "question_order",
    "split_of",
    "unpack",
    "window",
]


class Split(StrEnum):
    """What a question is used for. Each question belongs to exactly one split."""

    FIT = "fit"  #: a learner fits its coefficients on these; never scored
    SEARCH = "search"  #: candidates are scored on these during the search
    VALIDATION = "validation"  #: the best few are compared on these afterwards
    TEST = "test"  #: opened once, for the report


@dataclass(frozen=True)
class SplitShares:
    """Shares of the questions.

    Attributes:
        search, validation, test: They sum to one.
        fit: The part of the search share that a learner fits on; 0 unless a learner needs it.
    """

    search: float = 0.6
    validation: float = 0.2
    test: float = 0.2
    fit: float = 0.0


def split_of(document_hash: str, shares: SplitShares) -> Split:
    """The split of a document. It depends on the document's content alone, so equal documents share a split.

    >>> all(split_of(f"document {i}", SplitShares(search=1.0, fit=1.0)) is Split.FIT for i in range(100))
    True
    """
    u = unit_interval("split", document_hash)
    if u < shares.search:
        return Split.FIT if u < shares.fit else Split.SEARCH
    return Split.VALIDATION if u < shares.search + shares.validation else Split.TEST


def question_order(document_hash: str) -> float:
    """Sort key of the order of questions. It is independent of the split."""
    return unit_interval("order", document_hash)


def window(n: int, fidelity: float, after: float = 0.0) -> slice:
    """The first share `fidelity` of n ordered questions, without the first share `after`.

    Shares are rounded up to whole questions, and to at least two, so that every score has an error bar.

    >>> window(100, fidelity=0.25), window(100, fidelity=0.001)
    (slice(0, 25, None), slice(0, 2, None))

    Args:
        n: The number of questions.
        fidelity: The share at which the window ends.
        after: The share at which it begins.

    Raises:
        EvaluationError: Unless 0 <= after < fidelity <= 1.
    """
    if not 0 <= after < fidelity <= 1:
        raise EvaluationError(f"must be 0 <= after < fidelity <= 1, got fidelity={fidelity}, after={after}")
    start, stop = (min(n, max(2, math.ceil(share * n - 1e-9))) if share else 0 for share in (after, fidelity))
    return slice(start, stop)


@dataclass(frozen=True)
class MetricInfo:
    """A metric of a task. Its name in objectives is ``task/metric``.

    >>> MetricInfo("maths", "acc", True, {Split.SEARCH: 60}, chance=0.25).name
    'maths/acc'

    Attributes:
        task: The task's name, without a slash.
        metric: The metric's name within the task.
        higher_is_better: The metric's direction.
        n_questions: The number of questions in each split.
        chance: The expected score of a uniform guess; None if it is not known.
        is_cost: The metric is a price, not a skill (drift, seconds). Costs are no part of means over tasks or of
            retention, and no expert is the teacher of a cost.
        member_of: The task, a group, that counts instead of this one; '' if this one counts. A member is scored and can
            be named, and is no part of means over tasks or of retention.
    """

    task: str
    metric: str
    higher_is_better: bool
    n_questions: Mapping[Split, int]
    chance: float | None = None
    is_cost: bool = False
    member_of: str = ""

    @property
    def name(self) -> str:
        return f"{self.task}/{self.metric}"


@dataclass(frozen=True)
class Scores:
    """Per-question values of one metric.

    Attributes:
        ids: Document hashes, in the order of questions. Shape (n,).
        values: The score of each question. Shape (n,), float64, finite.
        score: The metric over all questions: a mean, unless the metric aggregates otherwise.
        stderr: The standard error of `score`.
        probability: The probability that the model gives to the right answer of each question; None unless the task is
            multiple choice. Shape (n,).
        is_corrected: Whether `score` was extrapolated from a prefix of the questions to all of them. `stderr` includes
            the uncertainty of that.
        is_linearised: Whether `values` are each question's part of `score` to first order (a difference between groups,
            for instance). Their mean is the score and they can be paired, but they depend on what was asked together.
            They cannot be joined.
    """

    ids: tuple[str, ...]
    values: NDArray[np.float64]
    score: float
    stderr: float
    probability: NDArray[np.float64] | None = None
    is_corrected: bool = False
    is_linearised: bool = False

    @property
    def is_mean(self) -> bool:
        """Whether `score` is the mean of `values`, up to the rounding of `pack`. Then scores can be paired."""
        return math.isclose(self.score, float(self.values.mean()), rel_tol=1e-3, abs_tol=1e-4)

    @property
    def is_joinable(self) -> bool:
        """Whether a question's value does not depend on the others, so that parts of the questions can be joined."""
        return self.is_mean and not self.is_linearised

    def joined(self, more: Scores) -> Scores:
        """The scores of these questions and of those in `more`, which follow them. Both must be joinable."""
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
    """What was spent.

    >>> Cost(merge_s=1.0, questions=10) + Cost(evaluate_s=2.0, questions=5)
    Cost(merge_s=1.0, evaluate_s=2.0, questions=15)

    Attributes:
        merge_s: Seconds of wall time spent on merging.
        evaluate_s: Seconds of wall time spent on evaluating.
        questions: The number of questions asked. A backward pass counts as two forward passes.
    """

    merge_s: float = 0.0
    evaluate_s: float = 0.0
    questions: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.merge_s + other.merge_s, self.evaluate_s + other.evaluate_s, self.questions + other.questions)


@dataclass(frozen=True)
class AnswerEnds:
    """How the generated answers of a task ended.

    Attributes:
        n: Number of answers.
        cut: Number of answers that have as many tokens as are allowed, and no ending.
        empty: Number of answers without a character that is not white space.
    """

    n: int = 0
    cut: int = 0
    empty: int = 0

    def __add__(self, other: AnswerEnds) -> AnswerEnds:
        return AnswerEnds(self.n + other.n, self.cut + other.cut, self.empty + other.empty)


@dataclass(frozen=True)
class Evaluation:
    """Scores by metric name (``task/metric``) on one split at one fidelity.

    `answers` says how generated answers ended, by task. An evaluator may leave it out.
    """

    split: Split
    fidelity: float
    scores: Mapping[str, Scores]
    cost: Cost = field(default_factory=Cost)
    answers: Mapping[str, AnswerEnds] = field(default_factory=dict)

    def joined(self, more: Evaluation) -> Evaluation:
        """The evaluation of this prefix and of the questions in `more`, which follow it. All must be joinable."""
        scores = {name: s.joined(more.scores[name]) for name, s in self.scores.items()}
        answers = {t: self.answers.get(t, AnswerEnds()) + ends for t, ends in more.answers.items()}
        return Evaluation(self.split, more.fidelity, scores, self.cost + more.cost, {**self.answers, **answers})

    def check_finite(self) -> None:
        """Raise `NonFiniteError` with every metric whose score or values are not finite."""
        bad = [name for name, s in self.scores.items() if not (math.isfinite(s.score) and np.isfinite(s.values).all())]
        if bad:
            raise NonFiniteError(
                f"scores must be finite, got NaN or infinity for {', '.join(bad)} on the {self.split} split"
            )

    def to_attribute(self) -> dict[str, Any]:
        """Compact JSON for a trial's user attribute. `from_attribute` restores everything except the question ids."""
        return {
            "split": str(self.split),
            "fidelity": self.fidelity,
            "cost": [self.cost.merge_s, self.cost.evaluate_s, self.cost.questions],
            **({"answers": {t: [a.n, a.cut, a.empty] for t, a in self.answers.items()}} if self.answers else {}),
            "scores": {
                name: {
                    "score": s.score,
                    "stderr": s.stderr if math.isfinite(s.stderr) else None,
                    "n": len(s.values),
                    **({"is_corrected": True} if s.is_corrected else {}),
                    **({"is_linearised": True} if s.is_linearised else {}),
                    "values": pack(s.values),
                    **({} if s.probability is None else {"probability": pack(s.probability)}),
                }
                for name, s in self.scores.items()
            },
        }

    @classmethod
    def from_attribute(cls, data: Mapping[str, Any]) -> Evaluation:
        """Inverse of `to_attribute`. `Scores.ids` are empty: they are the evaluator's fixed order of questions."""
        scores = {
            name: Scores(
                ids=(),
                values=unpack(s["values"]),
                score=s["score"],
                stderr=math.nan if s["stderr"] is None else s["stderr"],
                probability=unpack(s["probability"]) if "probability" in s else None,
                is_corrected=s.get("is_corrected", False),
                is_linearised=s.get("is_linearised", False),
            )
            for name, s in data["scores"].items()
        }
        answers = {task: AnswerEnds(*numbers) for task, numbers in data.get("answers", {}).items()}
        return cls(Split(data["split"]), data["fidelity"], scores, Cost(*data["cost"]), answers)


def pack(values: NDArray[np.float64]) -> str:
    """Numbers as text: a letter, their count, a colon and base64.

    The letter says how the numbers are stored: ``b`` for one bit each, where all of them are 0 or 1; ``e`` for float16,
    where all of them lie in [0, 1]; ``f`` for float32 otherwise.

    >>> text = pack(np.array([1.0, 0.0, 1.0]))
    >>> text, unpack(text).tolist()
    ('b3:oA==', [1.0, 0.0, 1.0])
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
            A failed call is charged the difference. An evaluator that leaves it at 0 is charged for completed calls
            only.
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

        It may be called again, with the live model of other shapes that a transform made: from then on that one is
        scored. What is compared with the base (drift) is compared with the weights of the first call.

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
class ChecksPrompts(Protocol):
    """What an `Evaluator` also has where its prompts can be checked before any weight is loaded."""

    def check_prompts(self, folder: str) -> None:
        """Check what the tokenizer of the base alone decides.

        Args:
            folder: The folder of the base checkpoint.

        Raises:
            StudyFileError: Prompts that cannot be rendered with this tokenizer.
        """
        ...


@runtime_checkable
class ComparesWithExperts(Protocol):
    """What an `Evaluator` also has where it compares a merge with what single experts answer.

    After `bind` and before the first `evaluate` the live model gets the weights of each of these experts once, and
    `cache_expert` is called. What an expert is asked then counts as questions. A second `bind` keeps what was stored.
    """

    def compared_experts(self) -> Sequence[str]:
        """Names of the experts. Needs no bound model."""
        ...

    def cache_expert(self, expert: str) -> None:
        """Store what is needed of the live model's answers. It has the weights of `expert` at this moment."""
        ...


@runtime_checkable
class ChecksModels(Protocol):
    """What an `Evaluator` also has where it can tell from a config whether it can score a model."""

    def check_model(self, config: Mapping[str, Any], what: str) -> None:
        """Check a model that a transform makes, or an expert of other shapes, before any weight is loaded.

        Args:
            config: Its config.json.
            what: Names the model in messages.

        Raises:
            StudyFileError: The evaluator cannot score it.
        """
        ...


@runtime_checkable
class Differentiable(Protocol):
    """What an `Evaluator` also has where a loss of the live model can be differentiated.

    The rows to fit on are a task's own training split where it has one, else the FIT share of its search split. No row
    to fit on is ever scored.

    Kinds of loss:
        gold: Negative log-likelihood of the right answer.
        pseudo: Negative log-likelihood of the answer that the task's teacher gives (see `set_pseudo_labels`).
        kl: Divergence from the teacher's output distribution (see `Teachable`).
        entropy: Entropy of the model's own answer. Needs no label.
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
    """A `Differentiable` with the loss ``kl``: the divergence from a teacher's outputs to the live model's."""

    def cache_teacher(self, task: str, rows: Sequence[int]) -> None:
        """Store the live model's outputs on these rows of `task`. The teacher's weights are loaded at this moment.

        Rows that are not named keep what was stored for them.
        """
        ...

    def teacher_questions(self, task: str) -> int:
        """Number of questions that `cache_teacher` asks per row."""
        ...


@runtime_checkable
class Generating(Differentiable, Protocol):
    """A `Differentiable` with losses of answers that the live model generates first."""

    def generated_questions(self, task: str, kind: str) -> int:
        """Number of questions that `loss` of this kind asks per row besides its forward and backward pass."""
        ...


@runtime_checkable
class Grading(Differentiable, Protocol):
    """A `Differentiable` that can tell which answers its tasks score right, the answers that they call gold included.

    A task may then have the kind of loss ``correct``: ``pseudo`` on the rows that its teacher answers right.
    """

    def why_not_gold(self, task: str) -> str | None:
        """Why `task` has no loss ``gold``, as a clause after its name: its metric scores the gold text wrong.

        None if it has one, or lacks it for another reason. Needs no bound model.
        """
        ...

    def auto_loss(self, task: str) -> str:
        """The kind of loss that ``auto`` stands for. Needs no bound model."""
        ...

    def right_rows(self, task: str, rows: Sequence[int]) -> list[int]:
        """Those of `rows`, in their order, whose answer of `set_pseudo_labels` the task scores right."""
        ...


@runtime_checkable
class Answering(Differentiable, Protocol):
    """A `Differentiable` that can list the answers which a row may have, for the true Fisher information."""

    def answers(self, task: str, row: int) -> tuple[Any, Any] | None:
        """-log p of every answer that the row may have, and the probability that the live model gives to each.

        Returns:
            Tensors of shape (answers,): losses with their graph through the live parameters, in the unit of the loss
            ``gold``, and probabilities without a graph, which sum to one. None where the answers cannot be listed.
        """
        ...


@runtime_checkable
class Counting(Protocol):
    """The earlier name of what every `Evaluator` has now: a count of its questions. Kept for classes that import it."""

    n_asked: int


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn an exception of an evaluator, a user's own included, into one that ends the trial and not the study.

    Args:
        what: The subject of the message: what failed.

    Raises:
        EvaluationError: In place of an exception of any other kind.
        MemoryError: In place of every error by which torch reports that no memory is left.
        MergeSearchError: An exception of this kind passes unchanged.
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
    """`Differentiable.loss` of a task as a function of the rows. Its exceptions are those of `asking`."""

    def loss(rows: Sequence[int]) -> Any:
        with asking(f"task {task!r}: its loss"):
            return evaluator.loss(task, rows, kind=kind)

    return loss


def kind_of(evaluator: Differentiable, task: str, kind: str) -> str:
    """The kind of loss of a task that `kind` stands for: itself, unless it is ``auto``.

    Without `Grading.auto_loss`, ``auto`` is ``gold`` where the task has it, else ``kl``, else its first loss.
    """
    if kind != "auto":
        return kind
    if isinstance(evaluator, Grading):
        return evaluator.auto_loss(task)
    has = evaluator.losses(task)
    return next((k for k in ("gold", "kl", *has) if k in has), "gold")


def predictions_of(evaluator: Differentiable, task: str) -> Callable[[Sequence[int]], list[Any]]:
    """`Differentiable.predict` of a task as a function of the rows. Its exceptions are those of `asking`."""

    def predict(rows: Sequence[int]) -> list[Any]:
        with asking(f"task {task!r}: its answers"):
            return evaluator.predict(task, rows)

    return predict


def answers_of(evaluator: Answering, task: str) -> Callable[[int], tuple[Any, Any] | None]:
    """`Answering.answers` of a task as a function of the row. Its exceptions are those of `asking`."""

    def answers(row: int) -> tuple[Any, Any] | None:
        with asking(f"task {task!r}: its answers"):
            return evaluator.answers(task, row)

    return answers

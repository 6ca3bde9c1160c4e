"""Jobs for a worker, its reports and its results: plain values that can go to another process.

An `Evaluation` travels as it is and not as its stored attribute, which rounds the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_search.errors import EvaluationError, InputError, MergeSearchError, NonFiniteError
from merge_search.evaluation import Cost, Evaluation, Split
from merge_search.memory import is_memory_error
from merge_search.outcome import Outcome
from merge_search.search.trial.racing import Race

__all__ = ["Failed", "Job", "Learned", "Report", "Reporter", "Result", "Scored", "Spent", "failure_of"]


@dataclass(frozen=True)
class Job:
    """A recipe to score.

    Attributes:
        recipe: As JSON.
        split: The questions.
        fidelity: The share of the questions.
        fit: Settings of the learner (`FitSettings` fields) that fits the recipe's coefficients first. None: no fit.
        race: The incumbent to compare with while the questions are asked. None: all questions are asked.
    """

    recipe: str
    split: Split = Split.SEARCH
    fidelity: float = 1.0
    fit: Mapping[str, Any] | None = None
    race: Race | None = None


@dataclass(frozen=True)
class Spent:
    """A report: the questions that the job has asked so far."""

    questions: int


@dataclass(frozen=True)
class Learned:
    """A report: the fit has ended, and its recipe is scored next.

    Attributes:
        recipe: With the fitted coefficients, as JSON.
        seconds: Wall time of the fit.
        questions: Questions that it asked, with those of statistics that it needed.
        losses: First and last loss by task.
        n_coefficients: Number of coefficients fitted.
    """

    recipe: str
    seconds: float
    questions: int
    losses: Mapping[str, Sequence[float]]
    n_coefficients: int


@dataclass(frozen=True)
class Scored:
    """A result: a recipe's scores.

    Attributes:
        evaluation: The scores. Of a prefix of the questions if the outcome is ``raced``.
        weights_sha256: Hash of the weights that gave them.
        merge_s: Seconds to write the recipe into the live model.
        outcome: ``ok`` or ``raced``.
        extra: Cost of the fit.
    """

    evaluation: Evaluation
    weights_sha256: str
    merge_s: float = 0.0
    outcome: Outcome = Outcome.OK
    extra: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Failed:
    """A result: the recipe could not be scored, for a reason that belongs to the recipe and not to the program.

    Attributes:
        outcome: The kind of failure.
        reason: What went wrong, in words.
        questions: Questions that the job had asked until then.
    """

    outcome: Outcome
    reason: str
    questions: int = 0

    def to_error(self, when: str) -> MergeSearchError:
        """The failure as an error to raise.

        Args:
            when: Names the occasion if memory ran out, as in "while 'maths' is scored".
        """
        match self.outcome:
            case Outcome.NON_FINITE:
                return NonFiniteError(self.reason)
            case Outcome.MERGE_ERROR:
                return InputError(self.reason)
            case Outcome.OUT_OF_MEMORY:
                return EvaluationError(
                    f"out of memory {when} ({self.reason or 'MemoryError'}): give evaluate a smaller batch_size or "
                    "max_length, models a dtype of fewer bytes (bfloat16), or take a device with more memory"
                )
        return EvaluationError(self.reason)


Report = Spent | Learned
Result = Scored | Failed
Reporter = Callable[[Report], None]
"""Receives a job's reports while it runs."""


def failure_of(error: BaseException, questions: int = 0) -> Failed | None:
    """`error` as a typed result; None if it says nothing about the recipe and must be raised."""
    match error:
        case RuntimeError() | MemoryError():
            return Failed(Outcome.OUT_OF_MEMORY, str(error), questions) if is_memory_error(error) else None
        case NonFiniteError():
            return Failed(Outcome.NON_FINITE, str(error), questions)
        case EvaluationError():
            return Failed(Outcome.EVALUATOR_ERROR, str(error), questions)
        case InputError():
            return Failed(Outcome.MERGE_ERROR, str(error), questions)
    return None

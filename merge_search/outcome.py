"""The typed end of a trial. A failure is a result with a reason and a cost, never a number."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Outcome"]


class Outcome(StrEnum):
    """How a trial ended, stored as its user attribute ``outcome``."""

    OK = "ok"  #: scored
    RACED = "raced"  #: stopped early by a paired comparison, with a score of larger variance
    NON_FINITE = "non_finite"  #: NaN or infinity in the weights or in a score
    OUT_OF_MEMORY = "out_of_memory"
    EVALUATOR_ERROR = "evaluator_error"
    MERGE_ERROR = "merge_error"
    LOST = "lost"  #: the process ended during the trial, which says nothing about its point
    DIED = "died"  #: the point kills its process: several processes died alone in it, and it was given up

    @property
    def is_scored(self) -> bool:
        """Whether the trial has a score."""
        return self in (Outcome.OK, Outcome.RACED)

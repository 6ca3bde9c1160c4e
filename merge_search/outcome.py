"""How a trial ended. A failure is a result with a reason and a cost, never a number."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Outcome"]


class Outcome(StrEnum):
    """Typed end of a trial; stored with it as the user attribute ``outcome``."""

    OK = "ok"  #: scored
    RACED = "raced"  #: stopped early by a paired comparison; its score has a larger variance
    NON_FINITE = "non_finite"  #: NaN or infinity in the weights or in a score
    OUT_OF_MEMORY = "out_of_memory"
    EVALUATOR_ERROR = "evaluator_error"
    MERGE_ERROR = "merge_error"
    LOST = "lost"  #: the process died in mid-trial; the same point was enqueued again
    DIED = "died"  #: it did so again and again; the point was given up

    @property
    def is_scored(self) -> bool:
        return self in (Outcome.OK, Outcome.RACED)

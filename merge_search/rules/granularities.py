"""Granularities: which tensors of an expert share one coefficient of a fit. torch-free.

`engine.learners.granularity` fits them. One from outside is a function

    part(group) -> text

of a tensor's name, block and module kind (`recipe.Group`). Tensors for which it returns the same text share a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from merge_search.rules.table import Rule, RuleTable

__all__ = ["GRANULARITIES", "GranularityInfo", "block_output_problems"]


@dataclass(frozen=True, kw_only=True)
class GranularityInfo(Rule):
    """One row of `GRANULARITIES`.

    Attributes:
        rows: Fit rows per task from which it pays. With fewer rows, finer coefficients overfit.
        is_within_blocks: No two blocks share a number.
    """

    rows: int = 0
    is_within_blocks: bool = True


GRANULARITIES: RuleTable[GranularityInfo] = RuleTable("granularity", (
    GranularityInfo(name="expert", summary="one number per expert", is_within_blocks=False),
    GranularityInfo(name="block", summary="per block", rows=200),
    GranularityInfo(name="block_kind", summary="per block and module kind", rows=300),
    GranularityInfo(name="tensor", summary="per tensor", rows=400),
    GranularityInfo(name="row", summary="per output row, in maps", rows=1000),
))  # fmt: skip
"""Granularities by the name that a learner's ``per`` uses. From these numbers of rows on, each paid on real models."""


def block_output_problems(granularities: Iterable[str]) -> list[str]:
    """Why block outputs cannot be fitted with some of these granularities, a sentence each."""
    return [
        f"block outputs are fitted block after block: set per to block or finer, not {name!r}"
        for name in granularities
        if name in GRANULARITIES and not GRANULARITIES[name].is_within_blocks
    ]

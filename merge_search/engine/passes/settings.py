"""What a recipe says of a tensor, and what the passes of one recipe share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from merge_search.engine.contracts import Numbers, Pass
from merge_search.engine.passes.measurements import Scope
from merge_search.engine.passes.order_statistics import Keep, Table
from merge_search.recipe import Recipe

__all__ = ["Known", "TensorSettings", "cuts", "largest_factors", "ranked_together"]


@dataclass(frozen=True)
class TensorSettings:
    """What a recipe says of one tensor: numbers of all its experts, in processing order."""

    experts: tuple[str, ...]
    coefficients: tuple[float, ...]
    densities: tuple[float, ...]
    scale: float


@dataclass(frozen=True)
class Known:
    """What the passes of one recipe share, found for the first tensor that asks.

    Attributes:
        settings: By tensor name. keeps: By table and count.
    """

    recipe: Recipe
    scope: Scope
    settings: dict[str, TensorSettings] = field(default_factory=dict)
    keeps: dict[tuple[Table, int], Keep] = field(default_factory=dict)

    def keep(self, table: Table, count: int) -> Keep:
        """`Table.keep`, once for all tensors that are ranked together."""
        if (table, count) not in self.keeps:
            self.keeps[table, count] = table.keep(count)
        return self.keeps[table, count]


def cuts(known: Known, tables: Sequence[Table], counts: Sequence[int], suffix: str = "") -> Numbers:
    """What keeps the `counts` largest scores: ``low``, ``high`` and ``cut`` of each expert, under names that end so."""
    keeps = [known.keep(t, k) for t, k in zip(tables, counts, strict=True)]
    return {
        "low" + suffix: [k.low for k in keeps],
        "high" + suffix: [k.high for k in keeps],
        "cut" + suffix: [k.cut for k in keeps],
    }


def ranked_together(recipe: Recipe, p: Pass) -> int:
    """How many entries are ranked together."""
    return (p.shape[-1] if p.shape else 1) if recipe.select.scope == "row" else math.prod(p.shape)


def largest_factors(recipe: Recipe, p: Pass) -> list[float]:
    """1 / the smallest keep probability of each expert; infinite where that is not known, or almost nothing."""
    if p.structure.select != "rank_probability":
        return [math.inf] * len(p.experts)
    last = ranked_together(recipe, p) - 1
    smallest = [first - fall * last for first, fall in zip(p.numbers["first"], p.numbers["fall"], strict=True)]
    return [1.001 / least if least > 1e-3 else math.inf for least in smallest]

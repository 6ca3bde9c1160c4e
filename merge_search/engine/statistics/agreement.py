"""Do the forms of a causal effect agree? Effects by part, and the rank correlation of two forms over the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from merge_search.engine.methods.allocate import ranks
from merge_search.recipe import Group

__all__ = ["effects", "spearman"]


def effects(
    statistic: Callable[[str, str, str], Tensor | None],
    groups: Mapping[str, Group],
    expert: str,
    *,
    form: str,
    partition: str,
) -> dict[str, float]:
    """Return |change of the mean loss| by part, for the parts that the expert changed.

    Args:
        statistic: (kind, expert, tensor) -> statistic, as a pool has it; measured now if it never was.
        groups: Group of every merged tensor.
        expert: The expert.
        form: As in `effect`.
        partition: As in `effect`.
    """
    found: dict[str, float] = {}
    for name, group in groups.items():
        value = statistic(f"effect@form={form},partition={partition}", expert, name)
        if value is not None and float(value[1]) > 0:
            found[group.key(partition)] = abs(float(value[0]))
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the correlation of the ranks of two lists, equal values sharing their mean rank; 0 if one is constant."""
    pairs = list(zip(ranks(a), ranks(b), strict=True))
    covariance = math.fsum((x - 0.5) * (y - 0.5) for x, y in pairs)
    squares = [math.fsum((pair[i] - 0.5) ** 2 for pair in pairs) for i in (0, 1)]
    return covariance / math.sqrt(squares[0] * squares[1]) if all(squares) else 0.0

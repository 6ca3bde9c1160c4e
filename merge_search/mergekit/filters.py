"""Numbers by tensor, written as a value of a mergekit file: a number, or a list of filters on tensor names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from merge_search.mergekit.values import Table, evaluate, shorten
from merge_search.recipe import Group

__all__ = ["as_value"]

Condition = dict[str, Any]


def as_value(table: Table, groups: Mapping[str, Group]) -> float | list[Condition] | None:
    """A value that gives every tensor its number; None where names cannot tell the tensors apart.

    Filters name module kinds or blocks where the names allow it, else tensors. The result is checked against every
    name.
    """
    short = shorten(table, groups.values())
    if not isinstance(short, dict):
        return short
    for conditions in (_compact(short, groups), _by_tensor(table, short["*"])):
        if conditions is not None and all(evaluate(conditions, n, 0.0, "", []) == v for n, v in table.items()):
            return conditions
    return None


def _compact(short: Mapping[str, float], groups: Mapping[str, Group]) -> list[Condition] | None:
    """One filter per key, the most specific keys first."""
    members: dict[str, list[str]] = {key: [] for key in short}
    generality: dict[str, int] = {}
    for name, group in groups.items():
        key = next(k for k in group.keys() if k in members)  # noqa: SIM118
        members[key].append(name)
        generality[key] = 0 if key == name else 3 - key.count(".") if key.startswith("block.") else 3
    conditions = []
    for key in sorted((k for k in short if k != "*" and members[k]), key=lambda k: generality[k]):
        pattern = _common(members[key], groups)
        if pattern is None:
            return None
        conditions.append({"filter": pattern, "value": short[key]})
    return [*conditions, {"value": short["*"]}]


def _common(names: list[str], groups: Mapping[str, Group]) -> str | None:
    """A part that all of `names` have: their common beginning up to a dot, or a component that no other tensor has."""
    if len(names) == 1:
        return names[0]
    split = [n.split(".") for n in names]
    same = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False)))
    start = "".join(f"{parts[0]}." for parts in same)
    if start and not any(start in other for other in groups if other not in names):
        return start
    shared = set.intersection(*map(set, split))
    free = sorted(part for part in shared if not any(part in other for other in groups if other not in names))
    return max(free, key=len) if free else start or None


def _by_tensor(table: Table, common: float) -> list[Condition]:
    """One filter per tensor, longer names first, since a name may be part of another."""
    names = sorted((n for n, v in table.items() if v != common), key=lambda n: (-len(n), n))
    return [*({"filter": n, "value": table[n]} for n in names), {"value": common}]

"""Evaluates the parameters of a mergekit file for every tensor, and writes numbers by tensor as short as possible.

A parameter has one of three forms:

- a number;
- a gradient: a list of numbers that are spread evenly over the layers of the slice and joined by straight lines;
- a list of ``{filter, value}``: the first entry whose filter is part of the tensor's name applies.

A parameter is looked up at the model, then at the slice, then at the file. The places of tensors along a gradient were
measured on mergekit 0.1.5. In a slice of n layers, layer i stands at i / (n - 1), and the only layer of a slice stands
at its end. Tensors before the layers (embeddings and their norms) stand at the beginning of the first slice. Tensors
behind them (last norm, head) stand at the beginning of the last slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merge_search.engine.checkpoints.layout import is_before_blocks
from merge_search.mergekit.document import Document, Slice, Source
from merge_search.recipe import Group

__all__ = ["Place", "Table", "as_number", "evaluate", "gradient_at", "lookup", "needs_layout", "place_of", "shorten"]

Table = dict[str, float]
"""A number for every tensor, by name."""

Place = tuple[int, float]
"""Index of a tensor's slice, and the tensor's place in it from 0 to 1."""


def as_number(value: Any) -> float | None:
    """The number that a YAML value means, in quotes too, as mergekit reads it; None if it means none."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def gradient_at(anchors: Sequence[float], t: float) -> float:
    """The piecewise linear function through `anchors`, which are spread evenly over [0, 1], at `t`."""
    if len(anchors) == 1:
        return anchors[0]
    at = min(max(t, 0.0), 1.0) * (len(anchors) - 1)
    low = min(int(at), len(anchors) - 2)
    return anchors[low] * (1 - (at - low)) + anchors[low + 1] * (at - low)


def place_of(group: Group, slices: Sequence[Slice]) -> Place:
    """The place of a tensor in a file with these slices, all of which have ends."""
    if group.block is None:
        return (0, 0.0) if is_before_blocks(group) else (len(slices) - 1, 0.0)
    for i, part in enumerate(slices):
        assert part.end is not None
        if part.start <= group.block < part.end:
            n = part.end - part.start
            return i, (group.block - part.start) / (n - 1) if n > 1 else 1.0
    raise AssertionError(f"block {group.block} is in no slice")  # checked when the slices were read


def evaluate(value: Any, name: str, t: float, where: str, problems: list[str]) -> float | None:
    """The number of one parameter for one tensor; None where the parameter does not apply to the tensor."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        for i, entry in enumerate(value):
            for key in entry.keys() - {"filter", "value"}:
                _note(problems, f"{where}[{i}].{key}: unknown key; a condition has filter and value")
            pattern = entry.get("filter")
            if pattern is None or pattern == "*" or str(pattern) in name:
                return evaluate(entry.get("value"), name, t, f"{where}[{i}].value", problems)
        return None
    if isinstance(value, list):
        anchors = [as_number(v) for v in value]
        known = [a for a in anchors if a is not None]
        if len(known) < len(anchors):
            _note(problems, f"{where}: a gradient must be a list of numbers, got {value!r}")
            return None
        return gradient_at(known, t) if known else None
    number = as_number(value)
    if number is None and value is not None:
        _note(problems, f"{where}: must be a number, a list of numbers or a list of filters, got {value!r}")
    return number


def lookup(
    key: str, source: Source | None, part: Slice, document: Document, name: str, t: float, problems: list[str]
) -> float | None:
    """A parameter of one tensor: the model's, else the slice's, else the file's."""
    chain: list[tuple[str, Mapping[str, Any]]] = [] if source is None else [(source.where, source.parameters)]
    for where, settings in [*chain, (part.where, part.parameters), ("", document.parameters)]:
        if key in settings:
            place = ".".join(p for p in (where, "parameters", key) if p)
            number = evaluate(settings[key], name, t, place, problems)
            if number is not None:
                return number
    return None


def _note(problems: list[str], text: str) -> None:
    if text not in problems:  # the same value is evaluated for many tensors
        problems.append(text)


def needs_layout(document: Document) -> bool:
    """Whether the numbers of the file depend on the names of the base's tensors."""
    if document.slices[0].end is not None:
        return True
    settings = [document.parameters, *(s.parameters for s in document.slices[0].sources)]
    return any(isinstance(v, list) for s in settings for v in s.values())


def shorten(table: Table, groups: Iterable[Group]) -> float | dict[str, float]:
    """The shortest `PerGroup` value that gives every tensor its number.

    The first that suffices: one number; numbers by module kind; numbers by block, and by module kind or tensor in
    blocks that are not uniform.
    """
    members = list(groups)
    common = Counter(table.values()).most_common(1)[0][0]
    if len(set(table.values())) == 1:
        return common
    by_kind = _uniform(members, table, lambda g: g.kind)
    if None not in by_kind.values():
        return {**{k: v for k, v in by_kind.items() if v is not None and v != common}, "*": common}
    result: dict[str, float] = {}
    inside = [g for g in members if g.block is not None]
    by_block = _uniform(inside, table, lambda g: f"block.{g.block}")
    for key, value in by_block.items():
        if value is not None:
            result[key] = value
        else:
            _descend(
                [g for g in inside if f"block.{g.block}" == key], table, lambda g: f"block.{g.block}.{g.kind}", result
            )
    kinds = {g.kind for g in inside}  # a kind's number would reach tensors inside the blocks too
    outside = [g for g in members if g.block is None]
    _descend(outside, table, lambda g: g.tensor if g.kind in kinds else g.kind, result)
    return {**{k: v for k, v in result.items() if v != common}, "*": common}


def _descend(members: list[Group], table: Table, key: Any, result: dict[str, float]) -> None:
    """Numbers by `key`, or by tensor where they are not uniform."""
    for name, value in _uniform(members, table, key).items():
        if value is not None:
            result[name] = value
        else:
            result.update({g.tensor: table[g.tensor] for g in members if key(g) == name})


def _uniform(members: list[Group], table: Table, key: Any) -> dict[str, float | None]:
    """The number that all members of a key share; None where they do not."""
    numbers: dict[str, set[float]] = {}
    for g in members:
        numbers.setdefault(key(g), set()).add(table[g.tensor])
    return {k: next(iter(v)) if len(v) == 1 else None for k, v in numbers.items()}

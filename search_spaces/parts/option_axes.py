"""Options of rules as a study file writes them: one value, a list to choose from, or a range to search.

    {tsv_m: {rank_share: 0.3}}                                  fixed
    {tsv_m: {rank_share: [0.25, 0.5, 1.0]}}                     one of these, without an order
    {wudi: {steps: {bounds: [50, 500], log: true}}}             searched; whole numbers where the default is one
    {svc: {alpha: search}}                                      searched in the range of the rule's table

``{bounds: null}`` is the table's range, too. Without ``log`` a range is searched on the scale of the table, or linearly
where it holds numbers that have no logarithm. ``search`` on a switch or a word with choices takes all of these.

A searched option is one more parameter of the space. It counts only where its method is chosen. A value that the rule
has anyway is not written into the recipe, so that equal merges have equal fingerprints. torch-free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_search.errors import nearest
from merge_search.recipe import Scalar
from merge_search.recipe_options import Home, value_at
from merge_search.rules import Rule, option_problems
from merge_search.rules.table import range_problem
from merge_search.space import Categorical, Float, Integer, Parameter

__all__ = ["SEARCH", "OptionAxis", "duplicates", "holds", "option_value", "usual", "usual_at"]

SEARCH = "search"
"""What a study file writes for the range of the table."""

GOLDEN = 0.6180339887498949


# ------------------------------------------------------------------------------------------- reading one option


def option_value(rule: Rule, name: str, written: object) -> tuple[Scalar | Parameter | None, list[str]]:
    """What a study file says about an option of `rule`: a fixed value, or the domain of a search.

    Returns:
        The value or domain, and [], or None and what is wrong: an unknown option, a wrong type, a value that the table
        does not allow, a list without a choice, bounds that are none.
    """
    if name not in rule.options:
        return None, option_problems(rule, {str(name): 0})
    what = f"option {name!r} of {rule.name!r}"
    if isinstance(written, Mapping):
        return _range(rule, name, written, what)
    if written == SEARCH and (rule.allowed(name) or not isinstance(rule.options[name], str)):
        return _range(rule, name, {"bounds": None}, what)
    if isinstance(written, Sequence) and not isinstance(written, str):
        return _list(rule, name, written, what)
    problems = _problems(rule, name, written, what)
    return (None, problems) if problems else (_typed(rule, name, written), [])


def _list(rule: Rule, name: str, written: Sequence[object], what: str) -> tuple[Parameter | None, list[str]]:
    if len(written) < 2:
        found = "an empty list" if not written else f"{list(written)!r}"
        hint = "" if not written else f"; to fix it, write {name}: {_shown(written[0])}"
        return None, [f"{what}: a list needs two or more values to choose from, got {found}{hint}"]
    problems = [p for value in written for p in _problems(rule, name, value, what)]
    if problems:
        return None, problems
    values = [_typed(rule, name, value) for value in written]
    if twice := duplicates(values):
        return None, [f"{what}: {', '.join(map(_shown, twice))} stands twice in {list(written)!r}"]
    return Categorical(tuple(values)), []


def _range(rule: Rule, name: str, written: Mapping[Any, Any], what: str) -> tuple[Parameter | None, list[str]]:
    problems = [
        f"{what}: unknown key {k!r}{nearest(str(k), ('bounds', 'log'))}" for k in written if k not in RANGE_KEYS
    ]
    if "bounds" not in written and not problems:
        problems.append(f"{what}: a range needs bounds: {{bounds: [low, high]}}, got {dict(written)!r}")
    if not isinstance(written.get("log", False), bool):
        problems.append(f"{what}: log must be true or false, got {written['log']!r}")
    bounds = written.get("bounds")
    if bounds is not None and not rule.allowed(name):
        problems += _bounds_problems(rule, name, bounds, what)
    if problems:
        return None, problems
    if allowed := rule.allowed(name):
        if bounds is None and "log" not in written:
            return Categorical(tuple(allowed)), []
        return None, [f"{what}: has no range; list values to choose from: {', '.join(map(_shown, allowed))}"]
    info = rule.about.get(name)
    if bounds is None:
        bounds = info and (info.usual or info.bounds)
        if not bounds:
            return None, [f"{what}: the table has no range for it; give bounds: [low, high]"]
    low, high = bounds
    log = written.get("log", bool(info and info.log) and low > 0)
    if log and low <= 0:
        return None, [f"{what}: a logarithmic scale needs a lower bound above 0, got {low!r}; write log: false"]
    if _is_whole(rule, name):
        return Integer(int(low), int(high), log=log), []
    return Float(float(low), float(high), log=log), []


RANGE_KEYS = ("bounds", "log")


def _bounds_problems(rule: Rule, name: str, bounds: object, what: str) -> list[str]:
    if isinstance(rule.options[name], str | bool):
        return [f"{what}: has no range; list the values to choose from"]
    if not (isinstance(bounds, Sequence) and not isinstance(bounds, str) and len(bounds) == 2):
        return [f"{what}: bounds must be [low, high], got {bounds!r}"]
    if problems := [p for value in bounds for p in _problems(rule, name, value, what)]:
        return problems
    return [] if bounds[0] < bounds[1] else [f"{what}: bounds must have low < high, got {list(bounds)!r}"]


def _problems(rule: Rule, name: str, value: object, what: str) -> list[str]:
    """What is wrong with one value."""
    if not isinstance(value, bool | int | float | str):
        return [f"{what}: must be a number, a text, true or false, got {value!r}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{what}: must be finite, got {value!r}"]
    if problems := option_problems(rule, {name: value}):
        return [p + _yaml_hint(value) for p in problems]
    problem = range_problem(rule, name, value)
    return [problem] if problem else []


def _yaml_hint(value: Scalar) -> str:
    """YAML 1.1 reads 1e-5 as text."""
    if not isinstance(value, str) or not re.fullmatch(r"[+-]?\d+e[+-]?\d+", value.lower()):
        return ""
    mantissa, _, exponent = value.lower().partition("e")
    return f"; YAML reads that as text, write {mantissa}.0e{int(exponent):+d}"


def _typed(rule: Rule, name: str, value: Any) -> Scalar:
    """The value with the type of the option: 1 is 1.0 where the default is no whole number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and not _is_whole(rule, name) else value


def _is_whole(rule: Rule, name: str) -> bool:
    return isinstance(rule.options[name], int) and not isinstance(rule.options[name], bool)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def duplicates(values: Iterable[Scalar]) -> list[Scalar]:
    """The values that stand more than once, where True and 1 are two values."""
    seen: set[tuple[type, Scalar]] = set()
    out = []
    for value in values:
        key = (type(value), value)
        if key in seen:
            out.append(value)
        seen.add(key)
    return list(dict.fromkeys(out))


# ------------------------------------------------------------------------------------------------ searched options


def holds(domain: Parameter, value: Scalar | None) -> bool:
    """Whether a value lies in a domain."""
    if isinstance(domain, Categorical):
        return any(type(c) is type(value) and c == value for c in domain.choices)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and domain.low <= value <= domain.high  # type: ignore[operator]


def usual(domain: Parameter, published: Scalar | None) -> Scalar:
    """The published value, or the value of the domain that is nearest to it; the middle where there is none."""
    if isinstance(domain, Categorical):
        return published if published is not None and holds(domain, published) else domain.choices[0]
    if isinstance(published, int | float) and not isinstance(published, bool):
        return min(max(published, domain.low), domain.high)
    return _at(domain, 0.5)


def usual_at(domain: Parameter, published: Scalar | None, rank: int) -> Scalar:
    """A value for the initial point of this rank: the usual one first, then others that are spread over the domain."""
    first = usual(domain, published)
    if rank == 0:
        return first
    if isinstance(domain, Categorical):
        start = next(i for i, c in enumerate(domain.choices) if type(c) is type(first) and c == first)
        return domain.choices[(start + rank) % len(domain.choices)]
    return _at(domain, (rank * GOLDEN) % 1.0)


def _at(domain: Float | Integer, share: float) -> Scalar:
    if domain.log:
        value = math.exp(math.log(domain.low) + share * (math.log(domain.high) - math.log(domain.low)))
    else:
        value = domain.low + share * (domain.high - domain.low)
    value = min(max(value, domain.low), domain.high)
    return round(value) if isinstance(domain, Integer) else value


@dataclass(frozen=True)
class OptionAxis:
    """One searched option of a method.

    Attributes:
        name: The name of its parameter.
        domain: What is searched.
        homes: Where a recipe has its value, each with the value where the recipe says nothing; None: no number.
        published: The value of the method as it is.
    """

    name: str
    domain: Parameter
    homes: tuple[tuple[Home, Scalar | None], ...]
    published: Scalar | None

    def write(self, data: dict[str, Any], value: Scalar) -> None:
        """Put a value into a recipe's data, which are changed."""
        for home, absent in self.homes:
            write(data, home, value, absent)

    def read(self, data: Mapping[str, Any]) -> Scalar | None:
        """The value that a recipe's data have; None where they have no place for it, or two values."""
        values = [value_at(data, home, absent) for home, absent in self.homes]
        return values[0] if all(_same(v, values[0]) for v in values) else None

    @property
    def usual(self) -> Scalar:
        """The value in points whose method does not read it."""
        return usual(self.domain, self.published)

    def usual_at(self, rank: int) -> Scalar:
        """Its value in the initial point of this rank."""
        return usual_at(self.domain, self.published, rank)


def write(data: dict[str, Any], home: Home, value: Scalar, absent: Scalar | None) -> None:
    """Put a value at its place. An option that has the value already, or takes it by itself, is not written."""
    if _same(value_at(data, home, absent), value):
        return
    where: Any = data
    for key in home[:-1]:
        where = where[key]
    if "options" in home and _same(absent, value):
        del where[home[-1]]
    else:
        where[home[-1]] = value


def _same(a: Scalar | None, b: Scalar | None) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)

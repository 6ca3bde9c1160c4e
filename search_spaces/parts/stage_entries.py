"""Entries of ``assess``, ``select``, ``resolve`` and ``splice``: rules by name, with fixed or searched options.

    assess: [magnitude, {measure: fisher, options: {power: {bounds: [0.5, 1.5]}}}]
    select: [top_k, {kind: rank_probability, epsilon: search}]
    splice: [sum, {kind: softmax, temperature: {bounds: [0.1, 10], log: true}}]

An entry's name, by which a study knows it, is that of its rule with the fixed options.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from merge_search.errors import nearest
from merge_search.options import sentences_at
from merge_search.recipe import Assess, Resolve, Scalar, Select, Splice
from merge_search.recipe_options import Home
from merge_search.rules import MEASURES, SELECTIONS, SPLICES, STAGES, Rule, option_problems
from merge_search.rules.stages import select_fields
from merge_search.rules.table import range_problem
from search_spaces.parts.methods import Stages
from search_spaces.parts.option_axes import SEARCH, OptionAxis, option_value, write

__all__ = ["StageEntry", "StageItem", "read_options", "stage_entries"]

StageItem = str | dict[str, Any]
"""An entry as written."""

KINDS: Mapping[str, tuple[type[BaseModel], str]] = {
    "assess": (Assess, "measure"),
    "select": (Select, "kind"),
    "resolve": (Resolve, "kind"),
    "splice": (Splice, "kind"),
}
"""Stage -> its model, and the key that names the rule."""


@dataclass(frozen=True)
class StageEntry:
    """One entry.

    Attributes:
        name: Its part of a method's name.
        value: The stage, with the usual values of its searched options.
        options: These.
    """

    name: str
    value: Any
    options: tuple[OptionAxis, ...] = ()

    def named(self, after: Select | Splice) -> str:
        """Its part of the name once the stage was brought into its canonical form."""
        return self.name if self.value.kind == after.kind else after.kind


def stage_entries(stage: str, items: Sequence[StageItem], problems: list[str]) -> list[StageEntry]:
    """The entries that are right; problems of the others are added to `problems`."""
    kind, key = KINDS[stage]
    out: dict[str, tuple[StageItem, StageEntry]] = {}
    for i, item in enumerate(items):
        given: dict[str, Any] = {key: item} if isinstance(item, str) else dict(item)
        place = ("space", stage, str(i))
        if key not in given:
            problems.append(f"{'.'.join(place)}: needs the key {key!r}")
            continue
        name = str(given[key])
        usual = SELECTIONS[name].usual if stage == "select" and name in SELECTIONS else {}
        options, wrong = _searched(stage, name, given)
        plain = deepcopy({**usual, **given})
        for option in options:
            _fill(plain, option)
        if wrong:
            problems += [f"{'.'.join(place)}: {text}" for text in wrong]
            continue
        try:
            value = kind.model_validate(plain)
        except ValidationError as error:
            problems += [_with_kinds(s, stage, name) for s in sentences_at(error, kind, place)]
            continue
        wrong = _problems(value)
        problems += [f"{'.'.join(place)}: {text}" for text in wrong]
        searched = {option.homes[0][0][1:] for option in options}
        extra = _flat({k: v for k, v in given.items() if k != key}, searched)
        entry = StageEntry(f"{name}({', '.join(extra)})" if extra else name, value, tuple(options))
        _, first = out.setdefault(entry.name, (item, entry))
        if first != entry:
            problems.append(
                f"{'.'.join(place)}: {name!r} stands twice with different values to search; put them into one entry"
            )
    return [entry for _, entry in out.values()]


def read_options(entries: Sequence[StageEntry], stages: Stages) -> tuple[OptionAxis, ...]:
    """The searched options of a combination that its canonical form reads.

    Args:
        entries: Those of ``assess``, ``select``, ``resolve`` and ``splice``.
        stages: The canonical form.
    """
    assess, *others = entries
    out = [*assess.options] if stages.uses_scores else []
    kinds = (stages.select.kind, stages.resolve.kind, stages.splice.kind)
    for entry, kind in zip(others, kinds, strict=True):
        out += entry.options if entry.value.kind == kind else ()
    is_whole = stages.select.kind == "all"  # then no entry is one expert's alone
    return tuple(o for o in out if not (is_whole and o.homes[0][0][-1] in ("unique_boost", "boost_cap")))


# ------------------------------------------------------------------------------------------------ searched options


def _searched(stage: str, name: str, given: Mapping[str, Any]) -> tuple[list[OptionAxis], list[str]]:
    """The searched options of an entry, and what is wrong with them or with the range of a fixed number."""
    axes: list[OptionAxis] = []
    problems: list[str] = []
    for rule, home, options in _groups(stage, name, given):
        for option, written in options.items():
            if not _is_searched(rule, option, written):
                problem = range_problem(rule, option, written) if option in rule.options else ""
                problems += [problem] if problem else []
            elif len(home) == 1 and option not in _reads(stage, name):
                problems.append(f"{name!r} does not read {option!r}: nothing to search")
            else:
                domain, wrong = option_value(rule, option, written)
                problems += wrong
                if domain is not None and not isinstance(domain, Scalar):
                    absent = rule.options[option]
                    published = _usual(stage, name).get(option, absent)
                    homes = (((*home, option), absent),)
                    axes.append(OptionAxis(_parameter(home, rule.name, option), domain, homes, published))
    return axes, problems


def _groups(stage: str, name: str, given: Mapping[str, Any]) -> Iterator[tuple[Rule, Home, Mapping[str, Any]]]:
    """(row, place, options as written) of the rule, of a splice's own measure, and of the stage's fields."""
    tables: Mapping[str, Mapping[str, Rule]] = {"assess": MEASURES, "select": SELECTIONS, "splice": SPLICES}
    rule = tables.get(stage, {}).get(name)
    if rule is not None and isinstance(options := given.get("options"), Mapping):
        yield rule, (stage, "options"), options
    score = given.get("score")
    if stage == "splice" and isinstance(score, Mapping) and isinstance(options := score.get("options"), Mapping):
        measure = MEASURES.get(str(score.get("measure")))
        if measure is not None:
            yield measure, (stage, "score", "options"), options
    if stage in STAGES:
        row = select_fields(SELECTIONS[name]) if stage == "select" and name in SELECTIONS else STAGES[stage]
        yield replace(row, name=name), (stage,), {k: v for k, v in given.items() if k in row.options}


def _is_searched(rule: Rule, option: str, written: object) -> bool:
    if isinstance(written, list | Mapping):
        return True
    has_range = option in rule.options and (not isinstance(rule.options[option], str) or bool(rule.allowed(option)))
    return written == SEARCH and has_range


def _reads(stage: str, name: str) -> Collection[str]:
    """The fields of a stage that change the merge where it has this kind."""
    tables: Mapping[str, Mapping[str, Any]] = {"select": SELECTIONS, "splice": SPLICES}
    if stage in tables:
        return tables[stage][name].reads if name in tables[stage] else ()
    return () if name == "none" else STAGES[stage].options


def _usual(stage: str, name: str) -> Mapping[str, Scalar]:
    return SELECTIONS[name].usual if stage == "select" and name in SELECTIONS else {}


def _parameter(home: Home, rule: str, option: str) -> str:
    """``select.rank_probability.epsilon``, ``assess.fisher.power``, ``splice.score.fisher.power``."""
    stages = [str(key) for key in home if key != "options"]
    return ".".join([*stages, rule, option])


def _fill(entry: dict[str, Any], option: OptionAxis) -> None:
    """Put the usual value of a searched option in place of its list or range."""
    ((home, absent),) = option.homes
    where = entry
    for key in home[1:-1]:
        where = where[str(key)]
    del where[str(home[-1])]
    write(entry, home[1:], option.usual, absent)


# ------------------------------------------------------------------------------------------------- what is wrong


def _problems(value: Any) -> list[str]:
    """What is wrong with a stage whose fields have the right types."""
    match value:
        case Assess():
            usable = [name for name, m in MEASURES.items() if not (m.is_constant or m.after_mask)]
            if value.measure not in usable:
                return [f"no assessment is called {value.measure!r}{nearest(value.measure, usable)}"]
            return option_problems(MEASURES[value.measure], value.options)
        case Select():
            row = SELECTIONS[value.kind]
            out = option_problems(row, value.options)
            if row.needs and getattr(value, row.needs.partition(":")[0]) <= 0:
                out.append(f"give the number: {{kind: {value.kind}, {row.needs}}}")
            if value.scope not in row.scopes:
                out.append(f"{value.kind} ranks by {' or '.join(row.scopes)}, not by {value.scope}")
            return out
        case Splice():
            return option_problems(SPLICES[value.kind], value.options)
    return []


def _with_kinds(sentence: str, stage: str, name: str) -> str:
    """`sentence`, with the nearest known name where a name is wrong."""
    kind, key = KINDS[stage]
    tables: Mapping[str, Collection[str]] = {"select": SELECTIONS, "splice": SPLICES}
    words: Collection[str] = getattr(kind.model_fields[key].annotation, "__args__", ())
    known = tables.get(stage, words)
    if f".{key}: " not in sentence or name in known or not known:
        return sentence
    place = sentence.partition(f".{key}: ")[0]
    return f"{place}: no {kind.__name__.lower()} kind is called {name!r}{nearest(name, known)}"


def _flat(options: Mapping[str, Any], searched: Collection[Home], at: Home = ()) -> list[str]:
    out = []
    for key, value in options.items():
        here = (*at, key)
        if here not in searched:
            out += _flat(value, searched, here) if isinstance(value, Mapping) else [f"{key}={value}"]
    return out

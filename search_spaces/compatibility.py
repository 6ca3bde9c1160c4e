"""The default space: assessment x selection x splicing, with coefficients and densities per group.

It has two forms. With ``presets`` (the default) the categorical parameter ``preset`` names a published method:

    space: {type: compatibility, presets: [ties, dare, della], coefficients: {per: block}, density: {per: expert}}

A preset may have options of its rules and the numbers of its stages, ``{tsv_m: {rank_share: 0.3}}``. The same preset
with other options is another choice.

With lists of ``assess``, ``select``, ``splice`` (and ``resolve``) the categorical parameter ``method`` ranges over
their distinct valid combinations, named like "magnitude/top_k/sum". Combinations that mean the same merges, such as
random selection under two assessments, are one choice. An entry is a name or a mapping with options
(``{kind: top_k, scope: model}``, ``{measure: fisher, options: {normalise: true}}``). Names are those of
`merge_search.rules`, rules from outside included.

The space has 1 + M * C + M * D dimensions for M experts, C cells of coefficients and D cells of densities. It has no
category where there is one choice, and no densities where no choice reads them. Densities are searched on a logarithmic
scale: halving matters as much from 0.2 as from 0.8.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from merge_search.errors import SpaceError, nearest
from merge_search.options import sentences_at
from merge_search.recipe import Assess, Resolve, Select, Splice
from merge_search.rules import MEASURES, SELECTIONS, SPLICES, option_problems
from merge_search.space import SpaceContext
from search_spaces.parts.axes import per_cell
from search_spaces.parts.composed import Composed
from search_spaces.parts.grouping import DensityRange, Range
from search_spaces.parts.methods import (
    Method,
    PresetEntry,
    Stages,
    canonical,
    distinct,
    of_preset,
    of_stages,
    preset_entries,
    price_notes,
    why_senseless,
)
from search_spaces.parts.options import Options, space_options

__all__ = ["Compatibility"]

DEFAULT_PRESETS = ("task_arithmetic", "ties", "dare", "della", "magnitude_soft", "magnitude_hard")

Entry = str | dict[str, Any]
Entries = Annotated[tuple[Entry, ...], Field(min_length=1)]


class CompatibilityOptions(Options):
    coefficients: Range = Range(per="block")
    density: DensityRange = DensityRange()
    presets: Annotated[tuple[PresetEntry, ...], Field(min_length=1)] | None = None
    assess: Entries | None = None
    select: Entries | None = None
    resolve: Entries | None = None
    splice: Entries | None = None


class Compatibility(Composed):
    """Parameters: ``preset`` or ``method``, ``coefficient.EXPERT[.CELL]``, ``density.EXPERT[.CELL]``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(CompatibilityOptions, options)
        by_axes = [k for k in ("assess", "select", "resolve", "splice") if getattr(chosen, k) is not None]
        if by_axes and chosen.presets is not None:
            raise SpaceError(f"space: give either presets or {', '.join(by_axes)}, not both")
        methods, notes = _by_axes(chosen, context) if by_axes else _by_presets(chosen, context)
        if chosen.coefficients.bounds[0] < 0:
            forgetful = [m.name for m in methods if m.scaling == "mean"]
            if forgetful:
                raise SpaceError(
                    f"space.coefficients.bounds: {', '.join(forgetful)} divides by the sum of the coefficients, which "
                    f"must not change sign; the lower bound must be at least 0, got {chosen.coefficients.bounds[0]:g}"
                )
        n = len(context.experts)
        super().__init__(
            context,
            methods,
            per_cell("coefficient", context, chosen.coefficients),
            per_cell("density", context, chosen.density),
            choice="method" if by_axes else "preset",
            advice=f"coefficients and densities per: expert make {1 + 2 * n}",
        )
        self.notes += price_notes(methods, context)
        self.notes += notes + [
            f"{m.name!r} keeps a whole number of every {m.template.select.block_size} entries: densities act in steps"
            for m in methods
            if m.template.operator is None and SELECTIONS[m.template.select.kind].steps
        ]


def _by_presets(chosen: CompatibilityOptions, context: SpaceContext) -> tuple[list[Method], list[str]]:
    presets = preset_entries(chosen.presets or DEFAULT_PRESETS, context, at="space.presets")
    return distinct((of_preset(p.name, context, chosen=p) for p in presets), len(context.experts))


def _by_axes(chosen: CompatibilityOptions, context: SpaceContext) -> tuple[list[Method], list[str]]:
    problems: list[str] = []
    assess = _entries(Assess, "measure", "assess", chosen.assess or ("magnitude",), problems)
    select = _entries(Select, "kind", "select", chosen.select or ("all", "top_k", "bernoulli"), problems)
    resolve = _entries(Resolve, "kind", "resolve", chosen.resolve or ("none",), problems)
    splice = _entries(Splice, "kind", "splice", chosen.splice or ("sum", "score", "argmax"), problems)
    problems += _measure_problems(assess) + _kind_problems(select, splice)
    if problems:
        raise SpaceError(problems)
    methods: dict[str, Method] = {}
    notes = []
    for (a_name, a), (s_name, s), (r_name, r), (p_name, p) in product(assess, select, resolve, splice):
        stages = canonical(Stages(a, s, r, p), len(context.experts))
        if stages is None:
            notes.append(f"{why_senseless(Stages(a, s, r, p))}; left out")
            continue
        words = [a_name] if stages.uses_scores else []
        words += [_changed(s_name, s, stages.select), *([r_name] if stages.resolve.kind != "none" else [])]
        name = "/".join([*words, _changed(p_name, p, stages.splice)])
        methods.setdefault(repr(stages), of_stages(stages, name, context))
    if not methods:
        raise SpaceError(
            "space: no combination of assess, select and splice means anything; " + "; ".join(dict.fromkeys(notes))
        )
    return list(methods.values()), list(dict.fromkeys(notes))


def _measure_problems(assess: Sequence[tuple[str, Assess]]) -> list[str]:
    """Why measures cannot be an axis: unknown, with wrong options, or without a difference between parameters."""
    usable = [name for name, m in MEASURES.items() if not (m.is_constant or m.after_mask)]
    out = []
    for i, (_, a) in enumerate(assess):
        at = f"space.assess.{i}"
        if a.measure not in usable:
            out.append(f"{at}: no assessment is called {a.measure!r}{nearest(a.measure, usable)}")
        else:
            out += [f"{at}: {p}" for p in option_problems(MEASURES[a.measure], a.options)]
    return out


def _kind_problems(select: Sequence[tuple[str, Select]], splice: Sequence[tuple[str, Splice]]) -> list[str]:
    """Wrong options of selections and splices, and numbers that are missing."""
    out = []
    for i, (_, s) in enumerate(select):
        row, at = SELECTIONS[s.kind], f"space.select.{i}"
        out += [f"{at}: {p}" for p in option_problems(row, s.options)]
        if row.needs and getattr(s, row.needs.partition(":")[0]) <= 0:
            out.append(f"{at}: give the number: {{kind: {s.kind}, {row.needs}}}")
        if s.scope not in row.scopes:
            out.append(f"{at}: {s.kind} ranks by {' or '.join(row.scopes)}, not by {s.scope}")
    for i, (_, p) in enumerate(splice):
        out += [f"space.splice.{i}: {text}" for text in option_problems(SPLICES[p.kind], p.options)]
    return out


V = TypeVar("V", Assess, Select, Resolve, Splice)


def _changed(name: str, before: V, after: V) -> str:
    """The name of a stage after it was brought into its canonical form."""
    kinds: Callable[[Any], str] = lambda stage: stage.kind  # noqa: E731
    return name if kinds(before) == kinds(after) else kinds(after)


def _entries(kind: type[V], key: str, at: str, entries: Sequence[Entry], problems: list[str]) -> list[tuple[str, V]]:
    """(name, value) of every entry that is right; problems of the others are added to `problems`."""
    out: list[tuple[str, V]] = []
    for i, entry in enumerate(entries):
        given = {key: entry} if isinstance(entry, str) else dict(entry)
        selection = SELECTIONS.get(str(given.get(key))) if at == "select" else None
        usual = selection.usual if selection is not None else {}
        place = ("space", at, str(i))
        if key not in given:
            problems.append(f"{'.'.join(place)}: needs the key {key!r}")
            continue
        try:
            value = kind.model_validate({**usual, **given})
        except ValidationError as error:
            problems += [_with_kinds(s, str(given[key]), key, kind) for s in sentences_at(error, kind, place)]
            continue
        extra = _flat({k: v for k, v in given.items() if k != key})
        name = f"{given[key]}({', '.join(extra)})" if extra else str(given[key])
        out.append((name, value))
    return out


def _with_kinds(sentence: str, found: str, key: str, kind: type[BaseModel]) -> str:
    """`sentence`, with the nearest known name where a name is wrong."""
    tables: Mapping[type[BaseModel], Collection[str]] = {Select: SELECTIONS, Splice: SPLICES}
    literals: Collection[str] = getattr(kind.model_fields[key].annotation, "__args__", ())
    known = tables.get(kind, literals)
    if f".{key}: " not in sentence or found in known or not known:
        return sentence
    place = sentence.partition(f".{key}: ")[0]
    return f"{place}: no {kind.__name__.lower()} kind is called {found!r}{nearest(found, known)}"


def _flat(options: Mapping[str, Any]) -> list[str]:
    out = []
    for key, value in options.items():
        out += _flat(value) if isinstance(value, Mapping) else [f"{key}={value}"]
    return out

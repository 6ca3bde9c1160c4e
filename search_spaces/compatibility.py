"""The default space: assessment x selection x splicing, with coefficients and densities per group.

It has two forms. With ``presets`` (the default) the categorical parameter ``preset`` names a published method:

    space: {type: compatibility, presets: [ties, dare, della], coefficients: {per: block}, density: {per: expert}}

A preset may have options of its rules and its stages, fixed or searched: ``{tsv_m: {rank_share: {bounds: [0.2, 1]}}}``
(`parts.entries`). The same preset with other fixed options is another choice. Searched options are further parameters
and count where their preset is chosen. ``post: [{svc: {alpha: [0.05, 0.1]}}]`` applies post rules to every choice.

With lists of ``assess``, ``select``, ``splice`` (and ``resolve``) the categorical parameter ``method`` ranges over
their distinct valid combinations, named like "magnitude/top_k/sum". Combinations that mean the same merges, such as
random selection under two assessments, are one choice. An entry is a name or a mapping with options
(``{kind: top_k, scope: model}``, ``{measure: fisher, options: {normalise: true}}``), which may be searched, too
(``{kind: softmax, temperature: search}``). ``options: {winsorise: search, allocate: magnitude}`` are
those of every combination that reads them. Names are those of `merge_search.rules`, rules from outside included.

The space has 1 + O + M * C + M * D dimensions for O searched options, M experts, C cells of coefficients and D cells of
densities. It has no category where there is one choice, and no densities where no choice reads them. Densities are
searched on a logarithmic scale: halving matters as much from 0.2 as from 0.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from merge_search.errors import SpaceError
from merge_search.rules import SELECTIONS
from merge_search.space import SpaceContext
from search_spaces.parts.axes import per_cell
from search_spaces.parts.composed import Composed
from search_spaces.parts.entries import PostEntry, PresetEntry, preset_methods, with_options, with_post_rules
from search_spaces.parts.grouping import DensityRange, Range
from search_spaces.parts.methods import Method, Stages, canonical, distinct, of_stages, why_senseless
from search_spaces.parts.options import Options, space_options
from search_spaces.parts.stage_entries import StageItem, read_options, stage_entries

__all__ = ["Compatibility"]

DEFAULT_PRESETS = ("task_arithmetic", "ties", "dare", "della", "magnitude_soft", "magnitude_hard")

Entries = Annotated[tuple[StageItem, ...], Field(min_length=1)]


class CompatibilityOptions(Options):
    coefficients: Range = Range(per="block")
    density: DensityRange = DensityRange()
    presets: Annotated[tuple[PresetEntry, ...], Field(min_length=1)] | None = None
    post: tuple[PostEntry, ...] = ()
    assess: Entries | None = None
    select: Entries | None = None
    resolve: Entries | None = None
    splice: Entries | None = None
    options: Annotated[dict[str, Any], Field(default_factory=dict)]


class Compatibility(Composed):
    """Parameters: ``preset`` or ``method``, options (``tsv_m.rank_share``, ``post.svc.alpha``),
    ``coefficient.EXPERT[.CELL]``, ``density.EXPERT[.CELL]``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(CompatibilityOptions, options)
        by_axes = [k for k in ("assess", "select", "resolve", "splice") if getattr(chosen, k) is not None]
        if by_axes and chosen.presets is not None:
            raise SpaceError(f"space: give either presets or {', '.join(by_axes)}, not both")
        if chosen.options and not by_axes:
            raise SpaceError(
                "space.options: options of presets stand in their entries: presets: [{ties: {winsorise: 0.01}}]"
            )
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
        self.notes += notes + [
            f"{m.name!r} keeps a whole number of every {m.template.select.block_size} entries: densities act in steps"
            for m in methods
            if m.template.operator is None and SELECTIONS[m.template.select.kind].steps
        ]


def _by_presets(chosen: CompatibilityOptions, context: SpaceContext) -> tuple[list[Method], list[str]]:
    presets = preset_methods(chosen.presets or DEFAULT_PRESETS, context, at="space.presets", post=chosen.post)
    return distinct(presets, len(context.experts))


def _by_axes(chosen: CompatibilityOptions, context: SpaceContext) -> tuple[list[Method], list[str]]:
    problems: list[str] = []
    assess = stage_entries("assess", chosen.assess or ("magnitude",), problems)
    select = stage_entries("select", chosen.select or ("all", "top_k", "bernoulli"), problems)
    resolve = stage_entries("resolve", chosen.resolve or ("none",), problems)
    splice = stage_entries("splice", chosen.splice or ("sum", "score", "argmax"), problems)
    methods: dict[str, Method] = {}
    notes = []
    for a, s, r, p in product(assess, select, resolve, splice) if not problems else ():
        written = Stages(a.value, s.value, r.value, p.value)
        stages = canonical(written, len(context.experts))
        if stages is None:
            notes.append(f"{why_senseless(written)}; left out")
            continue
        words = [a.name] if stages.uses_scores else []
        words += [s.named(stages.select), *([r.name] if stages.resolve.kind != "none" else [])]
        name = "/".join([*words, p.named(stages.splice)])
        axes = read_options((a, s, r, p), stages)
        key = repr((stages, [o.name for o in axes]))
        methods.setdefault(key, replace(of_stages(stages, name, context), options=axes))
    found = list(methods.values())
    try:
        found = with_options(found, chosen.options, context)
    except SpaceError as error:
        problems += error.problems
    try:
        found = with_post_rules(found, chosen.post, context)
    except SpaceError as error:
        problems += error.problems
    if problems:
        raise SpaceError(problems)
    if not found:
        raise SpaceError(
            "space: no combination of assess, select and splice means anything; " + "; ".join(dict.fromkeys(notes))
        )
    return found, list(dict.fromkeys(notes))

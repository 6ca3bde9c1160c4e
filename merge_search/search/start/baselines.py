"""Baselines of every search, which it begins with: base, experts, average, task arithmetic and published presets.

A preset whose coefficients are fitted by gradient (AdaMerging) is a baseline, too. It begins at its own coefficients,
whatever other trials have found. Later fits of its structure go on from its result. Where the space holds the result,
it is also one of the space's first points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merge_search.errors import InputError, nearest
from merge_search.options import read_options
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Recipe, Transform
from merge_search.search.plan import Baseline
from merge_search.space import SpaceContext
from merge_search.study_file import BaselineFit, BaselineOptions

__all__ = ["ALWAYS", "UNASKED", "baselines", "fits", "read_baselines", "reference_recipes"]

ALWAYS = ("average", "task_arithmetic")
"""Presets that every study tries, whatever its file names."""
UNASKED: tuple[str | Mapping[str, Mapping[str, Any]], ...] = (
    "tsv_m",
    "regmean_parts",
    {"regmean_parts": {"coefficient": 1.5}},
)
"""Baselines before the presets of the space where the study file names none: on real models the best merges that need
no search, so a small budget should reach them. `regmean_parts` needs prompts."""


def read_baselines(entries: Sequence[str | Mapping[str, Mapping[str, Any]]], problems: list[str]) -> list[Baseline]:
    """The baselines that a study file names; what is wrong with the others is added to `problems`."""
    out = []
    for i, entry in enumerate(entries):
        at = ("search", "baselines", str(i))
        pairs = [(entry, {})] if isinstance(entry, str) else list(entry.items())
        if len(pairs) != 1:
            problems.append(f"{'.'.join(at)}: write NAME or {{NAME: {{option: value}}}}, got {entry!r}")
            continue
        name, options = pairs[0]
        if name not in PRESETS:
            problems.append(f"search.baselines: no preset is called {name!r}{nearest(name, PRESETS)}")
            continue
        usual = PRESETS[name].fit
        try:
            if usual is None:
                read_options(BaselineOptions, options, at=(*at, name))
                out.append(Baseline(name, options))
            else:
                fit = read_options(BaselineFit, {**usual, **options}, at=(*at, name))
                out.append(Baseline(name, options, fit))
        except InputError as error:
            problems += error.problems
    return out


def reference_recipes(context: SpaceContext) -> dict[str, Recipe]:
    """Recipes of exact copies of the base and of each expert, by name."""
    if context.transform is not None:  # experts of other shapes are judged as they are, on models of their own
        alone = {name: Transform(name="alone", options={"model": name}) for name in context.experts}
        return {n: context.recipe(transform=t) for n, t in {"base": Transform(name="alone"), **alone}.items()}
    out = {"base": _preset("base", context)}
    return out | {expert: _preset("expert", context, expert=expert) for expert in context.experts}


def baselines(
    context: SpaceContext, named: Sequence[Baseline | str], *, can_measure: Callable[[str], bool] = lambda kind: False
) -> dict[str, Recipe]:
    """Recipes of the references, the average and task arithmetic, then of the presets `named` at their published
    settings.

    Args:
        context: The models.
        named: Presets. Those that do not take these experts are left out. The recipe of one whose coefficients are
            fitted is where the fit begins.
        can_measure: Says whether a statistic from data can be had. It is called for presets that need one.
    """
    chosen = {b.label: b for b in (b if isinstance(b, Baseline) else Baseline(b) for b in (*ALWAYS, *named))}
    kept = {label: b for label, b in chosen.items() if fits(b.name, context, can_measure)}
    return reference_recipes(context) | {label: _recipe(b, context) for label, b in kept.items()}


def fits(name: str, context: SpaceContext, can_measure: Callable[[str], bool] = lambda kind: False) -> bool:
    """Whether a preset takes these experts, and has data if it needs any."""
    row, n = PRESETS[name], len(context.experts)
    low, high = row.experts
    if n < low or (high is not None and n > high) or (row.needs_factors and context.without_factors):
        return False
    return not row.needs_data or can_measure(row.statistic)


def _recipe(baseline: Baseline, context: SpaceContext) -> Recipe:
    fit = baseline.fit
    if fit is not None:
        return _preset(baseline.name, context, coefficients=fit.start, densities=fit.density)
    return _preset(baseline.name, context, coefficients=baseline.options.get("coefficient"))


def _preset(name: str, context: SpaceContext, **settings: Any) -> Recipe:
    recipe = preset(name, context.models, seed=context.seed, dtype=context.dtype, **settings)
    return recipe.model_copy(update={"transform": context.transform})

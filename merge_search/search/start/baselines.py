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
from merge_search.study_file import BaselineFit

__all__ = ["ALWAYS", "baselines", "fits", "read_baselines", "reference_recipes"]

ALWAYS = ("average", "task_arithmetic")
"""Presets that every study tries, whatever its file names."""


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
        if (usual := PRESETS[name].fit) is None:
            if options:
                problems.append(f"{'.'.join(at)}: {name!r} has no options here; leave {', '.join(options)} out")
            out.append(Baseline(name))
            continue
        try:
            fit = read_options(BaselineFit, {**usual, **options}, at=(*at, name))
        except InputError as error:
            problems += error.problems
        else:
            out.append(Baseline(name, options, fit))
    return out


def reference_recipes(context: SpaceContext) -> dict[str, Recipe]:
    """Recipes of exact copies of the base and of each expert, by name."""
    if context.transform is not None:  # experts of other shapes are judged as they are, on models of their own
        alone = {name: Transform(name="alone", options={"model": name}) for name in context.experts}
        return {n: context.recipe(transform=t) for n, t in {"base": Transform(name="alone"), **alone}.items()}
    out = {"base": _preset("base", context)}
    return out | {expert: _preset("expert", context, expert=expert) for expert in context.experts}


def baselines(
    context: SpaceContext, named: Sequence[Baseline | str], *, can_measure: Callable[[], bool] = lambda: False
) -> dict[str, Recipe]:
    """Recipes of the references, the average and task arithmetic, then of the presets `named` at their published
    settings.

    Args:
        context: The models.
        named: Presets. Those that do not take these experts are left out. The recipe of one whose coefficients are
            fitted is where the fit begins.
        can_measure: Says whether presets that need statistics from data can have them. It is called only if one is
            named.
    """
    chosen = {b.label: b for b in (b if isinstance(b, Baseline) else Baseline(b) for b in (*ALWAYS, *named))}
    has_data = any(PRESETS[b.name].needs_data for b in chosen.values()) and can_measure()
    kept = {label: b for label, b in chosen.items() if fits(b.name, context, has_data=has_data)}
    return reference_recipes(context) | {label: _recipe(b, context) for label, b in kept.items()}


def fits(name: str, context: SpaceContext, *, has_data: bool = False) -> bool:
    """Whether a preset takes these experts, and has data if it needs any."""
    low, high = PRESETS[name].experts
    n = len(context.experts)
    if PRESETS[name].needs_factors and context.without_factors:
        return False
    return low <= n and (high is None or n <= high) and (has_data or not PRESETS[name].needs_data)


def _recipe(baseline: Baseline, context: SpaceContext) -> Recipe:
    fit = baseline.fit
    return _preset(baseline.name, context, **({"coefficients": fit.start, "densities": fit.density} if fit else {}))


def _preset(name: str, context: SpaceContext, **settings: Any) -> Recipe:
    recipe = preset(name, context.models, seed=context.seed, dtype=context.dtype, **settings)
    return recipe.model_copy(update={"transform": context.transform})

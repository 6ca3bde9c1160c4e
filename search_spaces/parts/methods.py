"""Merging methods as choices of a search space: all of a recipe except its coefficients and densities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import fsum
from typing import Any, Literal, NamedTuple

from merge_search.errors import RecipeError, SpaceError, nearest
from merge_search.presets import PRESETS, preset
from merge_search.recipe import Assess, Group, Recipe, Rescale, Resolve, Select, Splice, value_for
from merge_search.rules import MEASURES, OPERATORS, POSTS, SELECTIONS, SPLICES, Rule, option_problems
from merge_search.space import SpaceContext

__all__ = [
    "ChosenPreset",
    "Method",
    "PerExpert",
    "PresetEntry",
    "Stages",
    "canonical",
    "distinct",
    "of_preset",
    "of_stages",
    "preset_entries",
    "preset_problems",
    "price_notes",
    "why_senseless",
]

PerExpert = Mapping[str, float | dict[str, float]]

STAGES = (
    "winsorise", "winsorise_limits", "assess", "allocate", "select", "rescale", "resolve", "splice", "operator", "post",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One choice.

    Attributes:
        name: The parameter's value.
        template: A recipe with the method's stages; its coefficients and densities do not count.
        uses_density: Whether densities change the merge.
        fixed_densities: Whether densities are the template's and not searched.
        scaling: How `scale` is set. ``fold``: to 1, so that the coefficients hold all of the strength. ``mean``: to the
            mean of the coefficients, for a splice that divides by their sum and so forgets their size. ``fixed``: as in
            the template.
    """

    name: str
    template: Recipe
    uses_density: bool
    fixed_densities: bool = False
    scaling: Literal["fold", "mean", "fixed"] = "fold"

    @property
    def is_sum(self) -> bool:
        """Whether the strengths of the experts add up."""
        return self.template.operator is None and SPLICES[self.template.splice.kind].adds_up

    def recipe(self, coefficients: PerExpert, densities: PerExpert | None) -> Recipe:
        """The method's recipe with these numbers; densities of None are the template's."""
        update: dict[str, Any] = {"coefficients": dict(coefficients)}
        if densities is not None:
            update["densities"] = dict(densities)
        if self.scaling == "fold":
            update["scale"] = 1.0
        elif self.scaling == "mean":
            update["scale"] = _mean(coefficients)
        return self.template.model_copy(update=update)

    def same_stages(self, recipe: Recipe) -> bool:
        return all(getattr(self.template, s) == getattr(recipe, s) for s in STAGES) and not recipe.maps

    def turns_signs(self, recipe: Recipe) -> bool:
        """Whether the elected signs would turn if the scale of `recipe` were moved into its coefficients."""
        scales = recipe.scale.values() if isinstance(recipe.scale, dict) else [recipe.scale]
        return recipe.resolve.weighted and any(s < 0 for s in scales)

    def strength(self, recipe: Recipe, expert: str, group: Group) -> float:
        """The coefficient with which this method makes the merge of `recipe`, its scale taken into account."""
        value = recipe.coefficient(expert, group)
        scale = value_for(recipe.scale, group)
        if self.scaling == "fixed":
            return value
        if self.scaling == "fold":
            return value if scale == 1.0 else value * scale
        mean = _mean_of([recipe.coefficient(e, group) for e in recipe.models.experts])
        return value if mean == scale or mean == 0 else value * (scale / mean)


def _mean_of(values: Iterable[float]) -> float:
    numbers = list(values)
    return numbers[0] if len(set(numbers)) == 1 else fsum(numbers) / len(numbers)


def _mean(coefficients: PerExpert) -> float | dict[str, float]:
    """Mean over the experts by group. All experts have the same keys, or one number for all groups."""
    keys: dict[str, None] = {}
    for values in coefficients.values():
        keys |= dict.fromkeys(values if isinstance(values, dict) else ())
    if not keys:
        return _mean_of(v for v in coefficients.values() if not isinstance(v, dict))
    return {k: _mean_of(v[k] if isinstance(v, dict) else v for v in coefficients.values()) for k in keys}


def preset_problems(names: Iterable[str], context: SpaceContext, *, at: str) -> list[str]:
    """Why presets cannot be choices: they are unknown, do not fit the number of experts, or have no coefficients."""
    problems = []
    n = len(context.experts)
    for name in names:
        if name not in PRESETS:
            usable = [p.name for p in PRESETS.values() if p.is_linear]
            problems.append(f"{at}: no preset is called {name!r}{nearest(name, usable)}")
            continue
        p = PRESETS[name]
        low, high = p.experts
        if not p.is_linear:
            problems.append(f"{at}: {name!r} has no coefficients to search; list it under search.baselines")
        elif n < low or (high is not None and n > high):
            wanted = f"at least {low}" if high is None else f"{low} to {high}"
            problems.append(f"{at}: {name!r} needs {wanted} experts, and the study has {n}; leave it out")
    return problems


PresetEntry = str | dict[str, Any]
"""A preset by its name, or with options: ``{tsv_m: {rank_share: 0.3}}``."""


class ChosenPreset(NamedTuple):
    """A preset of a study file.

    Attributes:
        name: Its name.
        options: Its options as written.
        settings: Fields of the recipe that they change.
    """

    name: str
    options: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The name with the options, by which a study knows it."""
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})" if self.options else self.name


def preset_entries(entries: Sequence[PresetEntry], context: SpaceContext, *, at: str) -> list[ChosenPreset]:
    """The presets of a study file, each once.

    An option is one of the preset's rules (operator, post rule, measure), or a number that the preset's row gives to a
    stage (``gamma`` of breadcrumbs) or to ``winsorise``. A measure that both selects and weighs gets it for both.

    Raises:
        SpaceError: A preset or an option is unknown, cannot be a choice here, or has a wrong value; with all problems.
    """
    chosen: dict[str, ChosenPreset] = {}
    problems: list[str] = []
    for i, entry in enumerate(entries):
        place = f"{at}.{i}"
        pairs: list[tuple[str, Any]] = [(entry, {})] if isinstance(entry, str) else list(entry.items())
        if len(pairs) != 1 or not isinstance(pairs[0][1], Mapping):
            problems.append(f"{place}: write NAME or {{NAME: {{option: value}}}}, got {entry!r}")
            continue
        name, options = pairs[0]
        wrong = preset_problems([name], context, at=at)
        settings: dict[str, Any] = {}
        if not wrong and options:
            settings, wrong = _with_options(name, options)
            wrong = [f"{place}: {text}" for text in wrong or _recipe_problems(name, context, settings)]
        problems += wrong
        choice = ChosenPreset(name, options, settings)
        chosen.setdefault(choice.label, choice)
    if problems:
        raise SpaceError(problems)
    return list(chosen.values())


def _recipe_problems(name: str, context: SpaceContext, settings: Mapping[str, Any]) -> list[str]:
    try:
        preset(name, context.models, **settings)
    except RecipeError as error:
        return list(error.problems)
    return []


def _with_options(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A preset's settings under these options, and what is wrong with them."""
    settings: dict[str, Any] = deepcopy(dict(PRESETS[name].settings))
    rules = list(_rules(settings))
    stages = [settings, *(settings[s] for s in STAGES if isinstance(settings.get(s), dict))]
    numbers = {k for stage in stages for k, v in stage.items() if isinstance(v, int | float)}
    problems = []
    for key, value in options.items():
        homes = [(home, rule) for home, rule in rules if key in rule.options]
        if isinstance(value, list | tuple):
            problems.append(f"option {key!r} of {name!r} is one value; write one entry for each value, got {value!r}")
        elif homes:
            problems += option_problems(homes[0][1], {key: value})
        elif key not in numbers:
            known = sorted({*numbers, *(option for _, rule in rules for option in rule.options)})
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            problems.append(f"{name!r} has no option {key!r}{nearest(key, known) or f'; {there_are}'}")
        for home, _ in homes:
            home["options"] = {**home.get("options", {}), key: value}
        for stage in stages if not homes else ():
            if key in stage:
                stage[key] = value
    return settings, problems


def _rules(settings: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Rule]]:
    """The rules that a preset names: where its settings have their options, and their rows."""
    if "operator" in settings:
        yield settings["operator"], OPERATORS[settings["operator"]["name"]]
    for post in settings.get("post", ()):
        yield post, POSTS[post["name"]]
    splice = settings.get("splice", {})
    for home in (settings.get("assess"), splice.get("score"), settings.get("allocate")):
        if home is not None and "measure" in home:
            yield home, MEASURES[home["measure"]]


def of_preset(
    name: str, context: SpaceContext, *, search_density: bool = True, chosen: ChosenPreset | None = None
) -> Method:
    """The choice of a published method; its densities are the published ones where they are not searched.

    Args:
        name: The preset.
        context: The study's models.
        search_density: Whether densities are searched.
        chosen: Its options, if it has any.
    """
    settings = chosen.settings if chosen else {}
    template = preset(name, context.models, seed=context.seed, dtype=context.dtype, **settings)
    name = chosen.label if chosen else name
    uses = SELECTIONS[template.select.kind].uses_density and template.operator is None
    return Method(name, template, uses, fixed_densities=not search_density, scaling=_scaling(template))


def _scaling(template: Recipe) -> Literal["fold", "mean", "fixed"]:
    # NOTE: Fisher information measured at the scaled experts depends on the coefficients themselves, so a factor must
    # not move between them and the scale.
    score, splice = template.splice.score or template.assess, SPLICES[template.splice.kind]
    measure = MEASURES.get(score.measure)
    if template.post or (measure is not None and measure.depends_on_coefficients(score.options)):
        return "fixed"  # a rule on the combined delta need not be linear
    if splice.divides_by_coefficients:
        return "mean"
    return "fold" if splice.is_linear else "fixed"


def price_notes(methods: Iterable[Method], context: SpaceContext) -> list[str]:
    """What methods ask that ask every fit row about each part of the model."""
    notes = []
    for method in methods:
        rule = method.template.allocate
        row = MEASURES.get(rule.measure) if rule.kind == "importance" else None
        options = row.completed(rule.options) if row is not None and row.partition else {}
        if row is not None and options.get("form", "gradient") != "gradient":
            n = len({group.key(str(options[row.partition])) for group in context.groups})
            notes.append(
                f"{method.name!r} asks every fit row of an expert up to {1 + n} times, once in a study: for each of "
                f"{n} parts of the model (partition {options[row.partition]}) and once more"
            )
    return notes


@dataclass(frozen=True)
class Stages:
    """One combination of the axes."""

    assess: Assess
    select: Select
    resolve: Resolve
    splice: Splice

    @property
    def uses_scores(self) -> bool:
        return SELECTIONS[self.select.kind].uses_scores or self.mixes_scores

    @property
    def mixes_scores(self) -> bool:
        """Whether the splice reads the scores of `assess`."""
        return SPLICES[self.splice.kind].is_scored and self.splice.score is None


def why_senseless(stages: Stages) -> str:
    """Why a combination means nothing; '' if it means something."""
    measure, selection = MEASURES[stages.assess.measure], SELECTIONS[_plain_selection(stages.select).kind]
    if stages.mixes_scores and measure.shared:
        return f"{measure.name} scores all experts alike: {stages.splice.kind} has nothing to choose by"
    if selection.uses_scores and selection.compares and measure.per_tensor and stages.select.scope != "model":
        return f"{measure.name} is one number per tensor: within a tensor {selection.name} has nothing to choose by"
    return ""


def _plain_selection(select: Select) -> Select:
    """The simpler selection that a selection without its own parameter is."""
    if select.kind == "band" and select.gamma == 0:
        return select.model_copy(update={"kind": "top_k"})
    if select.kind == "rank_probability" and select.epsilon == 0:
        return Select(kind="bernoulli", vectors=select.vectors)
    return select


def canonical(stages: Stages, n_experts: int) -> Stages | None:
    """The one form of all combinations that mean the same merges; None for a combination that means nothing.

    - A selection without its own parameter is a simpler one (band without top, rank probability without slope).
    - With masks of zeros and ones, ``mask`` and ``count`` are one.
    - Where all experts survive and agree, dividing by their number or by the sum of the coefficients is ``sum`` with
      other coefficients.
    - One expert alone is never weighed against another.
    - Scores that no stage reads do not count.
    """
    if why_senseless(stages):
        return None
    assess, select, resolve, splice = stages.assess, _plain_selection(stages.select), stages.resolve, stages.splice
    selection = SELECTIONS[select.kind]
    if not (selection.uses_scores or selection.is_outside):
        select = select.model_copy(update={"scope": Select().scope})
    if n_experts == 1 and selection.is_hard and not SPLICES[splice.kind].is_outside:
        splice, resolve = Splice(), Resolve()
    if selection.is_hard and SPLICES[splice.kind].with_hard_masks:
        splice = splice.model_copy(update={"kind": SPLICES[splice.kind].with_hard_masks})
    everything = select.kind == "all" and select.gate == 0 and not select.exclusive and resolve.kind == "none"
    if everything and SPLICES[splice.kind].is_plain_of_all and splice.unique_boost == 0:
        splice = Splice()
    out = Stages(assess, select, resolve, splice)
    return out if out.uses_scores else Stages(Assess(), select, resolve, splice)


def distinct(methods: Iterable[Method], n_experts: int) -> tuple[list[Method], list[str]]:
    """The methods that differ in more than searched numbers, and a note for each one that was left out."""
    kept: dict[object, Method] = {}
    notes = []
    for method in methods:
        t = method.template
        form = canonical(Stages(t.assess, t.select, t.resolve, t.splice), n_experts)
        parts = (
            (form.assess, form.select, form.resolve, form.splice) if form else (t.assess, t.select, t.resolve, t.splice)
        )
        others = (t.winsorise, t.winsorise_limits, t.allocate, t.rescale, t.operator, *t.post)
        key = (repr(parts), repr(others), method.scaling == "fixed")
        first = kept.setdefault(key, method)
        if first is not method and first.name != method.name:
            notes.append(
                f"{method.name!r} differs from {first.name!r} only in numbers that are searched here; it is left out"
            )
    return list(kept.values()), notes


def of_stages(stages: Stages, name: str, context: SpaceContext) -> Method:
    """The choice of a combination. A random selection is rescaled so that the mean over its masks stays."""
    selection = SELECTIONS[stages.select.kind]
    template = context.recipe(
        assess=stages.assess,
        select=stages.select,
        rescale=Rescale.model_validate({"kind": selection.rescale}),
        resolve=stages.resolve,
        splice=stages.splice,
    )
    return Method(name, template, selection.uses_density, scaling=_scaling(template))

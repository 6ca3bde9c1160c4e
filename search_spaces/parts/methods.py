"""Merging methods as choices of a search space: all of a recipe except its coefficients and densities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import fsum
from typing import Any, Literal

from merge_search.recipe import Assess, Group, Recipe, Rescale, Resolve, Scalar, Select, Splice, value_for
from merge_search.rules import MEASURES, OPERATORS, SELECTIONS, SPLICES
from merge_search.space import Point, SpaceContext
from search_spaces.parts.option_axes import OptionAxis, holds

__all__ = [
    "Method",
    "PerExpert",
    "Stages",
    "canonical",
    "distinct",
    "of_stages",
    "of_template",
    "scaling_of",
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
        options: Its searched options.
    """

    name: str
    template: Recipe
    uses_density: bool
    fixed_densities: bool = False
    scaling: Literal["fold", "mean", "fixed"] = "fold"
    options: tuple[OptionAxis, ...] = ()

    def at(self, values: Point) -> Method:
        """The method with its options fixed at these values, which may hold others, too."""
        if not self.options:
            return self
        data = self.template.model_dump()
        for option in self.options:
            option.write(data, values[option.name])
        template = Recipe.from_dict(data)
        return replace(self, template=template, scaling=scaling_of(template), options=())

    def options_of(self, recipe: Recipe) -> dict[str, Scalar] | None:
        """The values of its options in a recipe; None if the recipe has others, or no place for them."""
        data = recipe.model_dump() if self.options else {}
        values = {option.name: option.read(data) for option in self.options}
        if not all(holds(option.domain, values[option.name]) for option in self.options):
            return None
        return {name: value for name, value in values.items() if value is not None}

    def holds(self, other: Method) -> bool:
        """Whether another method, which has nothing to search, is this one with some values of its options."""
        values = self.options_of(other.template)
        return not other.options and values is not None and self.at(values).same_stages(other.template)

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


def of_template(name: str, template: Recipe, options: tuple[OptionAxis, ...], *, search_density: bool) -> Method:
    """The choice of a recipe's stages; its densities are its own where they are not searched.

    Args:
        name: The parameter's value.
        template: The recipe.
        options: Its searched options.
        search_density: Whether densities are searched.
    """
    operator = template.operator
    uses = (SELECTIONS[template.select.kind] if operator is None else OPERATORS[operator.name]).uses_density
    return Method(
        name, template, uses, fixed_densities=not search_density, scaling=scaling_of(template), options=options
    )


def scaling_of(template: Recipe) -> Literal["fold", "mean", "fixed"]:
    """How a method's scale is set; `Method` says what the words mean."""
    # NOTE: Fisher information measured at the scaled experts depends on the coefficients themselves, so a factor must
    # not move between them and the scale.
    score, splice = template.splice.score or template.assess, SPLICES[template.splice.kind]
    measure = MEASURES.get(score.measure)
    if measure is not None and measure.depends_on_coefficients(score.options):
        return "fixed"
    if splice.divides_by_coefficients:
        return "mean"
    return "fixed" if template.post or not splice.is_linear else "fold"  # a post rule need not be linear


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
        searched = tuple((o.homes, o.domain) for o in method.options)
        key = (repr(parts), repr(others), method.scaling == "fixed", searched)
        first = kept.setdefault(key, method)
        if first is not method and first.name != method.name:
            notes.append(
                f"{method.name!r} differs from {first.name!r} only in numbers that are searched here; it is left out"
            )
    for method in list(kept.values()):
        if other := next((m for m in kept.values() if m.options and m is not method and m.holds(method)), None):
            notes.append(f"{method.name!r} is one point of {other.name!r}, whose options are searched; it is left out")
            kept = {key: m for key, m in kept.items() if m is not method}
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
    return Method(name, template, selection.uses_density, scaling=scaling_of(template))

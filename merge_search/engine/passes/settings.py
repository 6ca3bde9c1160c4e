"""A recipe, resolved for the engine: experts in order, measures as rows with complete options, numbers by tensor.

Every name in a recipe is looked up and checked once. Planner and measurements carry the results: an `Assessment` for a
measure, a `ResolvedRecipe` for a recipe, `TensorSettings` for the numbers of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.contracts import Source, is_vector
from merge_search.engine.methods.assess import AssessContext, load, measure_of
from merge_search.engine.passes.order_statistics import Cut, Thresholds
from merge_search.recipe import Assess, Recipe, Scalar, Select
from merge_search.rules import SELECTIONS, SPLICES, Measure, Selection, Splicing

__all__ = ["Assessment", "ResolvedRecipe", "Scope", "TensorSettings", "processing_order"]


@dataclass(frozen=True)
class Scope:
    """What scores are made from and ranked within, for one recipe.

    Attributes:
        experts: All experts of the recipe, in processing order.
        select: The recipe's selection.
        winsorise: Share of the deltas that is clipped at either end.
        seed: Of random scores.
        limits: Which values the limits of clipping are, as in `Recipe.winsorise_limits`.
    """

    experts: tuple[str, ...]
    select: Select
    winsorise: float
    seed: int
    limits: str = "interpolated"

    def covers(self, shape: tuple[int, ...] | torch.Size) -> bool:
        """Whether selection applies to tensors of this shape."""
        return self.select.vectors or not is_vector(shape)

    @cached_property
    def is_model(self) -> bool:
        """Whether all tensors are ranked together."""
        return self.select.scope == "model"

    def key(self) -> tuple[Hashable, ...]:
        """Everything that scores and their distribution depend on, but the seed."""
        return (self.experts, "model" if self.is_model else "tensor", self.select.vectors, self.winsorise, self.limits)


@dataclass(frozen=True, eq=False)
class Assessment:
    """One measure of one recipe, resolved.

    Attributes:
        measure: The row of the table of measures.
        options: The recipe's options, completed by the defaults.
        scope: What is scored and ranked together.
        source: How a pass gets the scores. Numeric options become numbers, text options part of the pass's structure.
        key: Everything that scores depend on, but the tensor and the coefficients.
        reduction_key: Everything that reductions over whole tensors depend on, but the tensor.
        depends_on_coefficients: Scores depend on the recipe's coefficients.
        is_plain_delta: Scores are |delta|, before any winsorising.
        scores: The measure's function.
        reduce: What the measure needs of whole tensors, one tuple per expert; None: nothing.
        pool: Combines one expert's tuples over parts or tensors; None: it cannot be done.
        numbers: Scalars of a pass from options, reductions and the counts of experts and active experts; None: none.
    """

    measure: Measure
    options: dict[str, Scalar]
    scope: Scope
    source: Source
    key: Hashable
    reduction_key: Hashable
    depends_on_coefficients: bool
    is_plain_delta: bool
    scores: Callable[[AssessContext], list[Tensor]]
    reduce: Callable[[AssessContext], list[tuple[float, ...]]] | None
    pool: Callable[[Sequence[tuple[float, ...]]], tuple[float, ...]] | None
    numbers: Callable[..., list[float]] | None

    @classmethod
    def resolve(cls, assess: Assess, scope: Scope) -> Assessment:
        """The assessment of a recipe's measure.

        Raises:
            RecipeError: The name or options are unknown. Reported all at once.
        """
        return cls.of(measure_of(assess), assess, scope)

    @classmethod
    def of(cls, measure: Measure, assess: Assess, scope: Scope) -> Assessment:
        """As `resolve`, of a measure whose row is known."""
        options, functions = measure.completed(assess.options), load(assess.measure)
        source = Source("given", measure.name)
        if measure.cheap:
            words = sorted((name, value) for name, value in options.items() if isinstance(value, str))
            source = Source("cheap", measure.name, tuple(words))
        rule, seed = (measure.name, measure.origin), scope.seed if measure.is_random else 0
        return cls(
            measure, options, scope, source,
            key=(rule, tuple(sorted(options.items())), scope.key(), seed),
            reduction_key=(rule, tuple(options[name] for name in measure.reduce_options), scope.key()),
            depends_on_coefficients=measure.depends_on_coefficients(assess.options),
            is_plain_delta=measure.name == "magnitude",
            scores=functions.scores, reduce=functions.reduce, pool=functions.pool, numbers=functions.numbers,
        )  # fmt: skip

    def at(self, coefficients: tuple[float, ...]) -> tuple[float, ...]:
        """The coefficients, where scores depend on them; else ()."""
        return coefficients if self.depends_on_coefficients else ()

    @cached_property
    def of_deltas(self) -> Assessment:
        """|delta| of the same experts, not winsorised."""
        return Assessment.resolve(Assess(), replace(self.scope, winsorise=0.0))

    @cached_property
    def without_added(self) -> Assessment:
        """The same without the option that is added to every score."""
        options = {**self.options, self.measure.added: 0.0}
        return Assessment.resolve(Assess(measure=self.measure.name, options=options), self.scope)


@dataclass(frozen=True)
class TensorSettings:
    """A recipe's numbers for one tensor.

    Attributes:
        experts: In processing order.
        coefficients: One per expert.
        densities: One per expert.
        scale: Of the combined delta.
    """

    experts: tuple[str, ...]
    coefficients: tuple[float, ...]
    densities: tuple[float, ...]
    scale: float

    def of(self, experts: tuple[str, ...]) -> TensorSettings:
        """Those of some of the experts."""
        places = [self.experts.index(e) for e in experts]
        coefficients, densities = ([numbers[i] for i in places] for numbers in (self.coefficients, self.densities))
        return TensorSettings(experts, tuple(coefficients), tuple(densities), self.scale)


def _scope(recipe: Recipe, experts: tuple[str, ...]) -> Scope:
    return Scope(experts, recipe.select, recipe.winsorise, recipe.seed, recipe.winsorise_limits)


def processing_order(recipe: Recipe, splice: Splicing, measures: Sequence[Measure]) -> tuple[str, ...]:
    """Experts in the order in which they are added up.

    They are sorted by name, so that the order in the recipe changes no bit. Where that order has a meaning, it is kept.
    Under names that sort differently the sums, and so the weights, may differ in their last bits.

    Args:
        splice: The row of the recipe's splice.
        measures: The rows of its measures.
    """
    if recipe.select.exclusive or splice.ordered or any(measure.ordered for measure in measures):
        return tuple(recipe.models.experts)
    return tuple(sorted(recipe.models.experts))


@dataclass(frozen=True, eq=False)
class ResolvedRecipe:
    """What the passes of one recipe share.

    Attributes:
        recipe: The recipe.
        scope: What is scored and ranked together.
        selection: The row of its selection.
        splice: The row of its splice.
        assess: The measure that selects.
        mixing: The measure of mixing scores; `assess` itself where it is the same.
        settings: Numbers by tensor name, made when first asked for.
    """

    recipe: Recipe
    scope: Scope
    selection: Selection
    splice: Splicing
    assess: Assessment
    mixing: Assessment
    settings: dict[str, TensorSettings] = field(default_factory=dict)
    _cuts: dict[tuple[Thresholds, int], Cut] = field(default_factory=dict)

    @classmethod
    def resolve(cls, recipe: Recipe) -> ResolvedRecipe:
        """Look up everything that a recipe names.

        Raises:
            RecipeError: A measure is unknown, or has no such option.
        """
        selection, splice = SELECTIONS[recipe.select.kind], SPLICES[recipe.splice.kind]
        measure, score = measure_of(recipe.assess), recipe.splice.score
        if score is None or score == recipe.assess:
            scope = _scope(recipe, processing_order(recipe, splice, [measure]))
            assess = Assessment.of(measure, recipe.assess, scope)
            return cls(recipe, scope, selection, splice, assess, assess)
        rows = [measure, measure_of(score)]
        scope = _scope(recipe, processing_order(recipe, splice, rows))
        assess, mixing = (Assessment.of(*pair, scope) for pair in zip(rows, (recipe.assess, score), strict=True))
        return cls(recipe, scope, selection, splice, assess, mixing)

    def cuts(self, thresholds: Sequence[Thresholds], counts: Sequence[int]) -> list[Cut]:
        """The cuts that keep the `counts` largest scores; those of a whole model are made once for all its tensors."""
        pairs = list(zip(thresholds, counts, strict=True))
        if not self.scope.is_model:
            return [t.cut(k) for t, k in pairs]
        for pair in pairs:
            if pair not in self._cuts:
                self._cuts[pair] = pair[0].cut(pair[1])
        return [self._cuts[pair] for pair in pairs]

    @cached_property
    def fingerprint(self) -> str:
        """The recipe's."""
        return self.recipe.fingerprint

    @cached_property
    def masks_fingerprint(self) -> str:
        """Of everything in the recipe that tensors given to a pass depend on."""
        blank: dict[str, Any] = {"scale": 1.0, "preset": ""}
        if not self.assess.depends_on_coefficients:
            blank["coefficients"] = {}
        return self.recipe.model_copy(update=blank).fingerprint

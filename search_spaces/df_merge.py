"""DF-Merge: one coefficient per expert in [0, 1]. Scaled deltas are averaged with their Fisher information as weights.

The Fisher information F is measured at the scaled models, base + coefficient x delta. With ``anchors: 0`` every
candidate measures it anew, as in the paper. With ``anchors: 0.5`` it is measured once at the coefficients 0, 0.5 and 1,
log F is interpolated between them, and a candidate costs its scoring alone. The finalists are then merged and scored
with F at their own coefficients, too (`exact_form`). ``answers: all`` is the paper's F, the mean over all answers by
their probability; ``gold`` is the empirical one, of the right answers. ``fisher: false`` is the paper's own ablation:
with equal Fisher information it is task arithmetic.

The paper's search is 10 random points and 50 by expected improvement over a Gaussian process:

    space: {type: df_merge, anchors: 0.5, answers: all}
    search: {sampler: botorch, sampler_options: {n_startup: 10}, n_trials: 66, baselines: []}
    statistics: {n_rows: 30}

Dimension: M for M experts, and one for every option that is searched.
Source: Lee et al. 2025, Dynamic Fisher-weighted Model Merging via Bayesian Optimization, arXiv 2504.18992. Differs: the
first points are uniform recipes, and expected improvement counts the noise; interpolation is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from merge_search.recipe import Recipe
from merge_search.space import SpaceContext
from search_spaces.parts.axes import per_cell
from search_spaces.parts.composed import Composed
from search_spaces.parts.entries import PostEntry, preset_methods
from search_spaces.parts.grouping import Range
from search_spaces.parts.options import Bounds, Options, space_options

__all__ = ["DfMerge"]

KINDS = {"gold": "fisher", "all": "true_fisher"}
"""Option ``answers`` -> option ``kind`` of the measure."""


class DfMergeOptions(Options):
    """Options of ``type: df_merge``.

    Attributes:
        fisher: Whether deltas are weighted by their Fisher information.
        bounds: Bounds of coefficients.
        anchors: Distance between the coefficients at which Fisher information is measured; 0: at every candidate's own.
        answers: The answers that it is taken over: the right ones, or all by their probability.
        options: Options of the preset, fixed or searched: ``{power: {bounds: [0, 1.5]}}``.
        post: Post rules on top of it.
    """

    fisher: bool = True
    bounds: Bounds = (0.0, 1.0)
    options: Annotated[dict[str, Any], Field(default_factory=dict)]
    post: tuple[PostEntry, ...] = ()
    anchors: Annotated[float, Field(ge=0)] = 0.0
    answers: Literal["gold", "all"] = "gold"

    @property
    def measured(self) -> dict[str, Any]:
        """Options of the measure that differ from its defaults."""
        kind = {} if self.answers == "gold" else {"kind": KINDS[self.answers]}
        return kind | ({"anchors": self.anchors} if self.anchors else {})


class DfMerge(Composed):
    """Parameters: ``coefficient.EXPERT``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(DfMergeOptions, options)
        name, fixed = ("df_merge", chosen.measured) if chosen.fisher else ("task_arithmetic", {})
        entry = {name: {**fixed, **chosen.options}}
        methods = preset_methods([entry], context, at="space.options", post=chosen.post, one=True)
        super().__init__(context, methods, per_cell("coefficient", context, Range(bounds=chosen.bounds)))

    def exact_form(self, recipe: Recipe) -> Recipe | None:
        """The recipe with Fisher information measured at its own coefficients; None if it was measured there."""
        score = recipe.splice.score
        if score is None or not score.options.get("anchors"):
            return None
        options = {key: value for key, value in score.options.items() if key != "anchors"}
        exact = score.model_copy(update={"options": options})
        return recipe.model_copy(update={"splice": recipe.splice.model_copy(update={"score": exact})})

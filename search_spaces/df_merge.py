"""DF-Merge: one coefficient per expert in [0, 1]. Scaled deltas are averaged with their Fisher information as weights.

``fisher: false`` is the paper's own ablation: with equal Fisher information it is task arithmetic.

Dimension: M for M experts, and one for every option that is searched.
Source: Lee et al. 2025, Dynamic Fisher-weighted Model Merging via Bayesian Optimization, arXiv 2504.18992.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from merge_search.space import SpaceContext
from search_spaces.parts.axes import per_cell
from search_spaces.parts.composed import Composed
from search_spaces.parts.entries import PostEntry, preset_methods
from search_spaces.parts.grouping import Range
from search_spaces.parts.options import Bounds, Options, space_options

__all__ = ["DfMerge"]


class DfMergeOptions(Options):
    """Options of ``type: df_merge``.

    Attributes:
        fisher: Whether deltas are weighted by their Fisher information.
        bounds: Bounds of coefficients.
        options: Options of the preset, fixed or searched: ``{power: {bounds: [0, 1.5]}}``.
        post: Post rules on top of it.
    """

    fisher: bool = True
    bounds: Bounds = (0.0, 1.0)
    options: Annotated[dict[str, Any], Field(default_factory=dict)]
    post: tuple[PostEntry, ...] = ()


class DfMerge(Composed):
    """Parameters: ``coefficient.EXPERT``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(DfMergeOptions, options)
        name = "df_merge" if chosen.fisher else "task_arithmetic"
        methods = preset_methods([{name: chosen.options}], context, at="space.options", post=chosen.post, one=True)
        super().__init__(context, methods, per_cell("coefficient", context, Range(bounds=chosen.bounds)))

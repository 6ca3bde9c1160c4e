"""DF-Merge: one coefficient per expert in [0, 1]. Scaled deltas are averaged with their Fisher information as weights.

``fisher: false`` is the paper's own ablation: with equal Fisher information it is task arithmetic.

Dimension: M for M experts.
Source: Lee et al. 2025, Dynamic Fisher-weighted Model Merging via Bayesian Optimization, arXiv 2504.18992.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_search.space import SpaceContext
from search_spaces.parts.axes import per_cell
from search_spaces.parts.composed import Composed
from search_spaces.parts.grouping import Range
from search_spaces.parts.methods import of_preset
from search_spaces.parts.options import Bounds, Options, space_options

__all__ = ["DfMerge"]


class DfMergeOptions(Options):
    """Options of ``type: df_merge``.

    Attributes:
        fisher: Whether deltas are weighted by their Fisher information.
        bounds: Bounds of coefficients.
    """

    fisher: bool = True
    bounds: Bounds = (0.0, 1.0)


class DfMerge(Composed):
    """Parameters: ``coefficient.EXPERT``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(DfMergeOptions, options)
        method = of_preset("df_merge" if chosen.fisher else "task_arithmetic", context)
        super().__init__(context, [method], per_cell("coefficient", context, Range(bounds=chosen.bounds)))

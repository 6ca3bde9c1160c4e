"""One coefficient and one density for all experts and tensors, and the choice of a preset.

Dimension: 1 to 3: the coefficient, the preset if several are listed, and the density if one of them reads it; and one
for every option that is searched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from merge_search.space import SpaceContext
from search_spaces.parts.axes import per_cell
from search_spaces.parts.composed import Composed
from search_spaces.parts.entries import PostEntry, PresetEntry, preset_methods
from search_spaces.parts.grouping import DensityRange, Range
from search_spaces.parts.methods import distinct
from search_spaces.parts.options import Bounds, DensityBounds, Options, space_options

__all__ = ["Uniform"]


class UniformOptions(Options):
    """Options of ``type: uniform``.

    Attributes:
        presets: The methods to choose from: names, or ``{NAME: {option: value}}``.
        post: Post rules on top of every method.
        bounds: Bounds of the coefficient.
        density: Bounds of the density.
    """

    presets: Annotated[tuple[PresetEntry, ...], Field(min_length=1)] = (
        "task_arithmetic",
        "ties",
        "dare",
        "della",
        "tsv_m",
    )
    post: tuple[PostEntry, ...] = ()
    bounds: Bounds = (0.0, 1.5)
    density: DensityBounds = (0.05, 1.0)


class Uniform(Composed):
    """Parameters: ``preset``, ``coefficient``, ``density``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(UniformOptions, options)
        presets = preset_methods(chosen.presets, context, at="space.presets", post=chosen.post)
        methods, notes = distinct(presets, len(context.experts))
        super().__init__(
            context,
            methods,
            per_cell("coefficient", context, Range(bounds=chosen.bounds), shared=True),
            per_cell("density", context, DensityRange(bounds=chosen.density), shared=True),
        )
        self.notes += notes

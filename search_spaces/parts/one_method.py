"""Options of the families that search the coefficients of one method."""

from __future__ import annotations

from merge_search.errors import SpaceError
from merge_search.space import SpaceContext
from search_spaces.parts.axes import Linear, per_cell
from search_spaces.parts.entries import PostEntry, PresetEntry, preset_methods
from search_spaces.parts.grouping import DensityRange
from search_spaces.parts.methods import Method
from search_spaces.parts.options import Bounds, Options

__all__ = ["OneMethod", "method_and_density"]


class OneMethod(Options):
    """Options that these families share.

    Attributes:
        bounds: Bounds of coefficients.
        preset: The method: a name, or ``{NAME: {option: value}}``.
        post: Post rules on top of it.
        density: Cells and bounds of densities; None: densities are as published.
    """

    bounds: Bounds = (0.0, 1.5)
    preset: PresetEntry = "task_arithmetic"
    post: tuple[PostEntry, ...] = ()
    density: DensityRange | None = None


def method_and_density(chosen: OneMethod, context: SpaceContext) -> tuple[Method, Linear | None]:
    """The method and the axis of its densities, or None for published densities.

    Raises:
        SpaceError: No such preset, or it reads no density.
    """
    searched = chosen.density is not None
    (method,) = preset_methods(
        [chosen.preset], context, at="space.preset", post=chosen.post, search_density=searched, one=True
    )
    if chosen.density is None:
        return method, None
    if not method.uses_density:
        raise SpaceError(f"space.density: preset {method.name!r} reads no density; leave it out")
    return method, per_cell("density", context, chosen.density)

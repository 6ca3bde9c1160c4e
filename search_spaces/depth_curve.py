"""Coefficients as curves over depth: linear between a few knots per expert.

Knots stand at whole blocks, evenly spaced, from the first block to the last. The parameter of a knot is the coefficient
of its block. Embeddings follow the first block, and all other tensors outside blocks follow the last. `density_knots`
gives densities the same form.

Dimension: M * knots, plus M * density_knots if given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from merge_search.errors import SpaceError
from merge_search.space import SpaceContext
from search_spaces.parts.axes import Linear, curve
from search_spaces.parts.composed import Composed
from search_spaces.parts.entries import PostEntry, PresetEntry, preset_methods
from search_spaces.parts.options import Bounds, DensityBounds, Options, space_options

__all__ = ["DepthCurve", "knot_positions"]

KNOTS = 4

Knots = Annotated[int, Field(ge=2)]


class DepthCurveOptions(Options):
    """Options of ``type: depth_curve``.

    Attributes:
        knots: Knots of the coefficients; None: four, or one per block if there are fewer blocks.
        bounds: Bounds of coefficients.
        preset: The method whose coefficients are searched: a name, or ``{NAME: {option: value}}``.
        post: Post rules on top of it.
        density_knots: Knots of the densities; None: densities are as published.
        density_bounds: Bounds of densities.
    """

    knots: Knots | None = None
    bounds: Bounds = (0.0, 1.5)
    preset: PresetEntry = "task_arithmetic"
    post: tuple[PostEntry, ...] = ()
    density_knots: Knots | None = None
    density_bounds: DensityBounds = (0.05, 1.0)


def knot_positions(n: int, n_blocks: int) -> list[int]:
    """`n` different blocks, evenly spaced, both ends included. Needs 1 <= n <= n_blocks.

    >>> knot_positions(4, 10)
    [0, 3, 6, 9]
    """
    return [0] if n == 1 else [(2 * j * (n_blocks - 1) + n - 1) // (2 * (n - 1)) for j in range(n)]


class DepthCurve(Composed):
    """Parameters: ``coefficient.EXPERT.knot.J`` and ``density.EXPERT.knot.J``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(DepthCurveOptions, options)
        depth = context.n_blocks
        problems = []
        if depth < 2:
            problems.append(
                f"space: a curve over depth needs at least 2 blocks, and the models have {depth}; use type: uniform"
            )
        for key in ("knots", "density_knots"):
            n = getattr(chosen, key)
            if n is not None and n > depth >= 2:
                problems.append(
                    f"space.{key}: at most one knot per block, {depth} here, got {n}; "
                    f"with {depth} it is type: blockwise"
                )
        method = None
        try:
            (method,) = preset_methods(
                [chosen.preset], context, at="space.preset", post=chosen.post, one=True,
                search_density=chosen.density_knots is not None,
            )  # fmt: skip
        except SpaceError as error:
            problems = error.problems + problems
        if problems or method is None:
            raise SpaceError(problems)
        density = None
        if chosen.density_knots is not None:
            if not method.uses_density:
                raise SpaceError(f"space.density_knots: preset {method.name!r} reads no density; leave it out")
            at = knot_positions(chosen.density_knots, depth)
            density = Linear("density", context, lambda g: curve(at, depth, g), chosen.density_bounds, log=True)
        knots = knot_positions(chosen.knots or min(KNOTS, depth), depth)
        coefficients = Linear("coefficient", context, lambda g: curve(knots, depth, g), chosen.bounds)
        super().__init__(context, [method], coefficients, density)

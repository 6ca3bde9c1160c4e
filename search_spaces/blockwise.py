"""One coefficient per expert and block: task arithmetic layer by layer (or another preset).

Dimension: M * (L + 1) for M experts and L blocks; M * L if no tensor lies outside the blocks. `density` adds its own.
Source: The layer-wise coefficients of AdaMerging (arXiv 2310.02575), searched instead of learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_search.space import SpaceContext
from search_spaces.parts.axes import per_cell
from search_spaces.parts.composed import Composed
from search_spaces.parts.grouping import Range
from search_spaces.parts.one_method import OneMethod, method_and_density
from search_spaces.parts.options import space_options

__all__ = ["Blockwise"]


class Blockwise(Composed):
    """Parameters: ``coefficient.EXPERT.block.N`` and ``coefficient.EXPERT.rest``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(OneMethod, options)
        method, density = method_and_density(chosen, context)
        coefficients = per_cell("coefficient", context, Range(per="block", bounds=chosen.bounds))
        super().__init__(
            context, [method], coefficients, density, advice=f"depth_curve with 4 knots has {4 * len(context.experts)}"
        )

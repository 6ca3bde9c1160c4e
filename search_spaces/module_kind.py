"""One coefficient per expert and module kind: attention, MLP, norm, embedding, head, other.

Dimension: M * K for M experts and K kinds that occur in the models. `density` adds its own.
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

__all__ = ["ModuleKind"]


class ModuleKind(Composed):
    """Parameters: ``coefficient.EXPERT.KIND``."""

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(OneMethod, options)
        method, density = method_and_density(chosen, context)
        super().__init__(
            context, [method], per_cell("coefficient", context, Range(per="kind", bounds=chosen.bounds)), density
        )

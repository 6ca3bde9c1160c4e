"""|delta|: large changes matter. Sources: TIES-Merging, arXiv 2306.01708; MagMax, arXiv 2407.06322."""

from __future__ import annotations

from torch import Tensor

from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return |delta| of each expert, float32."""
    return [t.abs() for t in context.deltas]

"""Uniform numbers from the recipe's seed, the expert and the element: a control that any assessment must beat."""

from __future__ import annotations

from torch import Tensor

from merge_search.engine.kernels.random_bits import indices, mask_keys, uniform
from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return uniform numbers in [0, 1) for each expert, float32."""
    assert context.group is not None
    index = indices(context.base.numel(), device=context.base.device).reshape(context.base.shape)
    return [
        uniform(index, *mask_keys(context.seed, f"score:{expert}", context.group.tensor)) for expert in context.experts
    ]

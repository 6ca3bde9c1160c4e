"""Passthrough: a copy of the base or of one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.errors import RecipeError, nearest

__all__ = ["merge"]


def merge(context: OperatorContext) -> Tensor:
    """theta = theta_0, or theta_i of the option ``expert``. Coefficients and scale play no part.

    Returns:
        float32: exactly the stored values where `OperatorContext.stored` is given.
    Raises:
        RecipeError: There is no such expert.
    Source: mergekit's ``passthrough``.
    """
    expert = str(context.options["expert"])
    if expert in ("", "base"):
        return context.base.clone()
    if expert not in context.experts:
        raise RecipeError(f"passthrough: no expert is called {expert!r}{nearest(expert, context.experts)}")
    if context.stored is not None:
        return context.stored(expert).to(device=context.base.device, dtype=torch.float32, copy=True)
    return context.base + context.deltas[context.experts.index(expert)]

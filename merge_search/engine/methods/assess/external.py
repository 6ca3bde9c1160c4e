"""Scores from elsewhere, read as the statistic named by the option ``name``: relevance propagation, any attribution."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.methods.assess import AssessContext
from merge_search.errors import RecipeError

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return the statistic of each expert, float32, shape of the tensor.

    Raises:
        RecipeError: The statistic is missing, or has another shape than the tensor.
    """
    assert context.group is not None
    name = context.group.tensor
    result = []
    for expert in context.experts:
        statistic = statistic_of(context.tensors, str(context.options["name"]), expert, name)
        if statistic.shape != context.base.shape:
            raise RecipeError(
                f"external scores of expert {expert!r} for {name!r} have shape {tuple(statistic.shape)}, "
                f"the tensor {tuple(context.base.shape)}"
            )
        result.append(statistic.to(context.base.device, torch.float32))
    return result

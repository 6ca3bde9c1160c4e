"""Scores that came from elsewhere, as a statistic called `name`: relevance propagation, any attribution."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.methods.assess import AssessContext
from merge_search.errors import RecipeError

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    assert context.group is not None
    name = context.group.tensor
    result = []
    for expert in context.experts:
        found = statistic_of(context.tensors, str(context.options["name"]), expert, name)
        if found.shape != context.base.shape:
            raise RecipeError(
                f"external scores of expert {expert!r} for {name!r} have shape {tuple(found.shape)}, the tensor {tuple(context.base.shape)}"
            )
        result.append(found.to(context.base.device, torch.float32))
    return result

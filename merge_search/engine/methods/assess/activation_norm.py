"""|delta| x L2 norm of the weight's input feature, per parameter. The statistic has shape (in,) for weights (out, in).

Source: Wanda, arXiv 2306.11695, applied to deltas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return |delta| x norm of each expert, float32.

    Raises:
        RecipeError: The statistic ``activation_norm`` was not measured.
    """
    assert context.group is not None
    name, device = context.group.tensor, context.base.device
    norms = [
        statistic_of(context.tensors, "activation_norm", e, name).to(device, torch.float32) for e in context.experts
    ]
    return [t.abs() * norm for t, norm in zip(context.deltas, norms, strict=True)]

"""Mean square of the surviving deltas, one number per expert and tensor.

As a mixing score it is computed by the engine from the surviving deltas. As a selection score it is that of the whole
delta.
Source: SCE (FuseChat), arXiv 2408.07990. Differs: mergekit weighs experts alike where the energies sum to less than
1e-6, which is the usual size of fine-tuning deltas. Here the ratio alone counts unless the option ``floor`` is set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return the mean square of each delta, 0-d float32, summed in float64."""
    return [(t.to(torch.float64) ** 2).mean().to(torch.float32) for t in context.deltas]

"""Diagonal Fisher information F_i^power + floor, from data.

The option ``kind`` says of what: of the right answers (``fisher``, empirical) or of all answers by their probability
(``true_fisher``). ``at`` selects where it was measured: ``expert`` (Fisher merging), or ``scaled`` for base +
coefficient x delta (DF-Merge), which is the statistic "fisher@<coefficient>". ``normalise`` divides by the norm of F
over the tensor.

``anchors`` > 0 measures only at its multiples a <= c < b, once, and interpolates logarithms between them,

    log(F(c) + floor) = (1 - t) log(F(a) + floor) + t log(F(b) + floor),    t = (c - a) / (b - a).

DF-Merge itself measures at every coefficient (``anchors`` 0); the interpolation is ours.
Sources: Fisher merging, arXiv 2111.09832; DF-Merge, arXiv 2504.18992.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.kernels.numerics import exp, log
from merge_search.engine.methods.assess import AssessContext, option
from merge_search.rules.measures import anchors_of

__all__ = ["interpolated", "scores"]


def scores(context: AssessContext) -> list[Tensor]:
    """Return F_i^power + floor of each expert, float32, shape of the tensor.

    Raises:
        RecipeError: The statistic was not measured.
    """
    result = []
    for i in range(len(context.experts)):
        f = _information(context, i)
        power = option(context, "power")
        if power != 1.0:
            f = f**power
        if context.options["normalise"]:
            f = f / torch.linalg.vector_norm(f.to(torch.float64)).clamp(min=1e-30).to(torch.float32)
        floor = option(context, "floor")
        result.append(f + floor if floor else f)
    return result


def _information(context: AssessContext, i: int) -> Tensor:
    assert context.group is not None
    kind, expert, name = str(context.options["kind"]), context.experts[i], context.group.tensor
    points = [(kind, 1.0)]
    if context.options["at"] == "scaled":
        points = [(f"{kind}@{c!r}", w) for c, w in anchors_of(context.coefficients[i], option(context, "anchors"))]
    ends = [statistic_of(context.tensors, k, expert, name).to(context.base.device, torch.float32) for k, _ in points]
    return interpolated(ends, [w for _, w in points], option(context, "floor"))


def interpolated(ends: list[Tensor], weights: list[float], floor: float) -> Tensor:
    """exp(sum of weights x log(F + floor)) - floor, at least 0; one end comes back as it is. float32."""
    if len(ends) == 1:
        return ends[0]
    logarithm = sum(log(f + floor) * w for f, w in zip(ends, weights, strict=True))
    assert isinstance(logarithm, Tensor)
    return (exp(logarithm) - floor).clamp_(min=0.0)

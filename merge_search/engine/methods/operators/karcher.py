"""Karcher mean: the point of the sphere with the least sum of squared angles to all experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.engine.methods.operators.sphere import angle, merged_weights, norm, points, unit, weights

__all__ = ["karcher_mean", "merge"]

_OPPOSED = 1e-6
"""Length of a mean of unit vectors, or distance of an angle from pi, below which there is no direction."""


def merge(context: OperatorContext) -> Tensor:
    """Karcher mean of the directions, weighted by the coefficients, times the mean norm.

    Zero vectors and their weights are left out. Where the directions cancel, the weighted mean of the vectors is used
    instead.
    Options: ``space``, and ``steps`` and ``tolerance`` of the iteration.
    Differs: mergekit weighs all experts alike.

    Returns:
        float32 weights, moved by `scale` from the base.
    Raises:
        RecipeError: A coefficient is negative.
    Source: Karcher 1977; mergekit's ``karcher``.
    """
    shares = weights(context)
    if not any(context.active) or not shares:
        return context.base.clone()
    alive = [(share, v, float(norm(v))) for share, v in zip(shares, points(context), strict=True) if share > 0]
    alive = [entry for entry in alive if entry[2] > 0]
    total = sum(share for share, _, _ in alive)
    if not alive:
        return context.base.clone()
    w = [share / total for share, _, _ in alive]
    directions = [unit(v) for _, v, _ in alive]
    mean = karcher_mean(directions, w, steps=int(context.number("steps")), tolerance=context.number("tolerance"))
    if mean is None:
        return merged_weights(context, torch.stack([w_i * v for w_i, (_, v, _) in zip(w, alive, strict=True)]).sum(0))
    return merged_weights(context, mean * sum(w_i * length for w_i, (_, _, length) in zip(w, alive, strict=True)))


def karcher_mean(directions: list[Tensor], w: list[float], *, steps: int, tolerance: float) -> Tensor | None:
    """Iterate u <- exp_u( sum_i w_i log_u(u_i) ) until the step is shorter than `tolerance`.

    Args:
        directions: Unit vectors of one shape.
        w: Weights that sum to one.
        steps: Most iterations.
        tolerance: Length of the last step.
    Returns:
        A unit vector, or None where the directions cancel and there is no unique mean.
    """
    u = torch.stack([w_i * d for w_i, d in zip(w, directions, strict=True)]).sum(0)
    if float(norm(u)) < _OPPOSED:
        return None
    u = unit(u)
    for _ in range(steps):
        step = torch.zeros_like(u)
        for w_i, d in zip(w, directions, strict=True):
            theta = float(angle(u, d))
            if theta < math.pi - _OPPOSED:  # all ways to the antipode are equally long: no step
                across = d - math.cos(theta) * u
                step += w_i * theta * unit(across)
        length = float(norm(step))
        if length < tolerance:
            break
        u = unit(math.cos(length) * u + math.sin(length) * unit(step))
    return u

"""Functions that the spherical operators share: the points they join, exact small angles, weights, the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.errors import RecipeError

__all__ = ["angle", "interpolate", "merged_weights", "norm", "points", "unit", "weights"]

Axis = int | None
"""Axis along which a vector runs; None for the whole tensor."""


def points(context: OperatorContext) -> list[Tensor]:
    """Return the experts' weights or deltas, as the option ``space`` says; float32.

    If the option ``base_weight`` is not zero, the base's weights or a zero delta come first.
    """
    if context.options["space"] == "delta":
        origin, experts = torch.zeros_like(context.base), list(context.deltas)
    elif context.stored is None:
        origin, experts = context.base, [context.base + delta for delta in context.deltas]
    else:
        origin = context.base
        experts = [context.stored(e).to(device=context.base.device, dtype=torch.float32) for e in context.experts]
    return [origin, *experts] if context.options.get("base_weight") else experts


def merged_weights(context: OperatorContext, point: Tensor) -> Tensor:
    """Return the weights of a merged point: theta_0 + scale * (theta - theta_0)."""
    if context.options["space"] == "delta":
        return context.base + context.scale * point
    return point if context.scale == 1.0 else context.base + context.scale * (point - context.base)


def weights(context: OperatorContext) -> list[float]:
    """Return the coefficients divided by their sum; empty if all are zero.

    If the option ``base_weight`` is not zero, it counts as the first coefficient.

    Raises:
        RecipeError: A coefficient is negative, for which there is no mean of directions.
    """
    for expert, coefficient in zip(context.experts, context.coefficients, strict=True):
        if coefficient < 0:
            raise RecipeError(
                f"spherical operators need coefficients >= 0, got {coefficient:g} for expert {expert!r}, "
                f"{context.where()}"
            )
    base_weight = float(context.options.get("base_weight", 0.0))
    shares = [base_weight, *context.coefficients] if base_weight else list(context.coefficients)
    total = sum(shares)
    return [c / total for c in shares] if total > 0 and base_weight >= 0 else []


def norm(x: Tensor, axis: Axis = None) -> Tensor:
    """Return the Euclidean length, 0-d for the whole tensor. The axis is kept."""
    length: Tensor = torch.linalg.vector_norm(x, dim=axis, keepdim=axis is not None)
    return length


def unit(x: Tensor, axis: Axis = None) -> Tensor:
    """Return x / |x|. Zeros stay zero."""
    return x / norm(x, axis).clamp_min(torch.finfo(x.dtype).tiny)


def angle(u: Tensor, v: Tensor, axis: Axis = None) -> Tensor:
    """Return the angle between unit vectors, in [0, pi].

    It is exact for small angles, where the arc cosine has no digits left.
    """
    return 2 * torch.atan2(norm(u - v, axis), norm(u + v, axis))


def interpolate(a: Tensor, b: Tensor, t: float, *, lerp_above: float, axis: Axis = None) -> Tensor:
    """sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b, where w is the angle between a and b; exactly a at t = 0 and b at 1.

    The path is straight where |cos w| > `lerp_above` (parallel, antipodal) or a vector is zero.
    """
    w = angle(unit(a, axis), unit(b, axis), axis)
    straight = (torch.cos(w).abs() > lerp_above) | (norm(a, axis) == 0) | (norm(b, axis) == 0)
    sine = torch.where(straight, 1.0, torch.sin(w))
    first = torch.where(straight, torch.full_like(w, 1 - t), torch.sin((1 - t) * w) / sine)
    second = torch.where(straight, torch.full_like(w, t), torch.sin(t * w) / sine)
    return first * a + second * b

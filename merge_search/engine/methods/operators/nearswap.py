"""Nearswap: the expert's value where it is close to the base's."""

from __future__ import annotations

from torch import Tensor

from merge_search.engine.methods.operators import OperatorContext
from merge_search.errors import RecipeError

__all__ = ["parts"]

_FLOOR = 1e-6


def parts(context: OperatorContext) -> list[Tensor]:
    """processed_i = w_i tau_i with w_i = min(1, t / max(|tau_i|, 1e-6)): deltas clipped to [-t, t].

    The method was published for one expert. Several experts are treated separately and added up.
    Options: ``t`` > 0; values from 1e-5 to 1e-2 are worth trying.

    Returns:
        float32, one tensor per expert.
    Raises:
        RecipeError: ``t`` is not positive.
    Source: mergekit's ``nearswap``.
    """
    t = context.number("t")
    if t <= 0:
        raise RecipeError(f"nearswap: t must be > 0, got {t:g}")
    return [delta * (t / delta.abs().clamp_min(_FLOOR)).clamp_max(1.0) for delta in context.deltas]

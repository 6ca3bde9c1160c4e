"""Parameter competition balancing as released: exp(k a~^2) x inter-task agreement.

a~ is |winsorised delta| scaled to [0, 1] over the tensor, or over the model if the model is ranked as one. k is the
option ``temperature``, by default the number of experts. The option ``inter`` selects the agreement:

    nlp      tanh(tau_i sum_j tau_j)
    vision   tanh(tau_i sum_j sign(tau_j) a~_j)
    es       sum_j tanh(sign_i a~_i sign_j a~_j)

The three are not equivalent, and all are called PCB. A negative score means that the parameter disagrees with the
others.
Source: PCB-Merging, arXiv 2410.02396, released code. Differs: a range of zero gives a~ = 0 instead of NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merge_search.engine.kernels.numerics import exp, tanh
from merge_search.engine.methods.assess import AssessContext
from merge_search.recipe import Scalar

__all__ = ["numbers", "pool", "reduce", "scores"]


def reduce(context: AssessContext) -> list[tuple[float, ...]]:
    """Return the smallest and largest |delta| of each expert."""
    return [tuple(float(v) for v in torch.aminmax(t.abs())) for t in context.deltas]


def pool(parts: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Combine one expert's (smallest, largest) pairs over tensors."""
    return (min(p[0] for p in parts), max(p[1] for p in parts))


def numbers(
    options: Mapping[str, Scalar], reduced: Sequence[tuple[float, ...]], n_experts: int, n_active: int
) -> list[float]:
    """Return the temperature, then (low, 1 / range) of each expert."""
    temperature = options.get("temperature")
    result = [float(n_experts if temperature is None else temperature)]
    for low, high in reduced:
        result += [low, 1.0 / (high - low) if high > low else 0.0]
    return result


def scores(context: AssessContext) -> list[Tensor]:
    """Return the scores of each expert, float32."""
    every = range(len(context.deltas))
    low, inverse = context.numbers[1::2], context.numbers[2::2]
    a = [(context.deltas[i].abs() - low[i]) * inverse[i] for i in every]
    return [exp(context.numbers[0] * (a[i] * a[i])) * t for i, t in enumerate(_inter(context, a))]


def _inter(context: AssessContext, a: Sequence[Tensor]) -> list[Tensor]:
    raw = context.raw
    signed = [torch.sign(t) * v for t, v in zip(raw, a, strict=True)]
    if context.options["inter"] == "es":
        return [_sum([tanh(mine * other) for other in signed]) for mine in signed]
    total = _sum(raw if context.options["inter"] == "nlp" else signed)
    return [tanh(t * total) for t in raw]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

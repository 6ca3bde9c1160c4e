"""Parameter competition balancing as published: softmax(M norm(tau_i^2)) x sum_j softmax(norm(tau_i tau_j)).

norm is the L2 normalisation. Norms and softmaxes run over what the option ``scope`` says:

    model        all parameters of the model, vectors too, as the paper has it
    tensor       the tensor's parameters, as the re-implementation has it. The default, so that recipes made before
                 there was another form keep their merges.

Scores are multiplied by the square of the number of those parameters, which keeps them near M instead of 1 / number^2.
In a large model they differ from M by less than float32, or a histogram of them, tells apart. With ``centred: true`` M
is subtracted, over the model in float64. Such scores rank as the others do and may be negative: they are for selection
alone.
Source: PCB-Merging, arXiv 2410.02396, equations as restated in a re-implementation. That the paper normalises over the
model is how we read it. Differs: over the model the deltas are not winsorised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext

__all__ = ["scores"]

_CHUNK = 2**18  # elements that are summed in float64 at a time

Pair = tuple[str, str]


def scores(context: AssessContext) -> list[Tensor]:
    """Return the scores of each expert, float32.

    Cost: one softmax per pair. Over the model also two sweeps over all tensors, once for all candidates.
    Memory beside the results: two tensors, which are reused.
    """
    if context.options["scope"] == "model":
        return _over_model(context)
    found = _over_tensor(context)
    return [t - context.n_experts for t in found] if context.options["centred"] else found


def _over_tensor(context: AssessContext) -> list[Tensor]:
    deltas = [t.reshape(-1) for t in context.deltas]
    product, shares = torch.empty_like(deltas[0]), torch.empty_like(deltas[0])
    inter = [torch.zeros_like(t) for t in deltas]
    for i, delta in enumerate(deltas):
        for j in range(i, len(deltas)):  # so that every sum runs over the experts in their order
            _unit(torch.mul(delta, deltas[j], out=product))
            torch.softmax(product, 0, out=shares)
            for k in {i, j}:
                inter[k] += shares
    for delta, result in zip(deltas, inter, strict=True):
        torch.softmax(_unit(torch.mul(delta, delta, out=product)).mul_(context.n_experts), 0, out=shares)
        result.mul_(shares).mul_(delta.numel() ** 2)  # a constant that keeps 1 / numel**2 out of the denormals
    return [t.reshape(context.base.shape) for t in inter]


def _unit(x: Tensor) -> Tensor:
    """Divide `x` by its length, in place."""
    parts = [part.to(torch.float64).square_().sum() for part in torch.split(x, _CHUNK)]
    return x.div_(torch.stack(parts).sum().sqrt().clamp(min=1e-30).to(torch.float32))


# ------------------------------------------------------------------------------------------------ over the model


class _Totals(NamedTuple):
    """What the softmaxes need of the whole model.

    Attributes:
        length: |tau_i tau_j| of every pair, 1 where it is zero.
        inter: log of the mean of exp(tau_i tau_j / length) of every pair.
        intra: log of the mean of exp(M tau_i^2 / length) of every expert.
    """

    length: Mapping[Pair, float]
    inter: Mapping[Pair, float]
    intra: Mapping[str, float]


_TOTALS: WeakKeyDictionary[Any, dict[tuple[str, ...], _Totals]] = WeakKeyDictionary()
"""Totals by the source of tensors and the experts."""


def _over_model(context: AssessContext) -> list[Tensor]:
    """Return exp(p_i) sum_j exp(q_ij), p and q the logarithms of the softmaxes times the number of parameters."""
    totals, m = _totals(context.tensors, context.every_expert), context.n_experts
    raw = {e: t.reshape(-1) for e, t in zip(context.experts, context.raw, strict=True)}
    result = [torch.empty_like(t) for t in raw.values()]
    for start in range(0, context.base.numel(), _CHUNK):
        part = {e: t[start : start + _CHUNK].to(torch.float64) for e, t in raw.items()}
        for out, (i, delta) in zip(result, part.items(), strict=True):
            own = delta.square().mul_(m / totals.length[i, i]).sub_(totals.intra[i]).expm1_()
            others = torch.zeros_like(own)
            for j in context.every_expert:
                pair = (i, j) if (i, j) in totals.length else (j, i)
                if j in part:
                    others += (delta * part[j]).div_(totals.length[pair]).sub_(totals.inter[pair]).expm1_()
                else:  # the expert left this tensor as it is
                    others += math.expm1(-totals.inter[pair])
            score = own * (others + m) + others  # less M, to the last digit
            out[start : start + _CHUNK] = score if context.options["centred"] else score + m
    return [t.reshape(context.base.shape) for t in result]


def _totals(tensors: Any, experts: tuple[str, ...]) -> _Totals:
    known = _TOTALS.setdefault(tensors, {})
    if experts not in known:
        known[experts] = _sweep(tensors, experts)
    return known[experts]


def _sweep(tensors: Any, experts: tuple[str, ...]) -> _Totals:
    pairs: list[Pair] = list(combinations_with_replacement(experts, 2))
    n = sum(math.prod(tensors.shape(name)) for name in tensors.groups)
    squares = dict.fromkeys(pairs, 0.0)
    for part in _deltas(tensors, experts):
        for i, j in pairs:
            squares[i, j] += float((part[i] * part[j]).square_().sum())
    length = {pair: math.sqrt(total) or 1.0 for pair, total in squares.items()}
    inter, intra = dict.fromkeys(pairs, 0.0), dict.fromkeys(experts, 0.0)  # sums of exp(...) - 1
    for part in _deltas(tensors, experts):
        for i, j in pairs:
            unit = (part[i] * part[j]).div_(length[i, j])
            if i == j:
                intra[i] += float((unit * len(experts)).expm1_().sum())
            inter[i, j] += float(unit.expm1_().sum())
    return _Totals(
        length,
        {pair: math.log1p(total / n) for pair, total in inter.items()},
        {expert: math.log1p(total / n) for expert, total in intra.items()},
    )


def _deltas(tensors: Any, experts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield all deltas of the model in chunks, float64."""
    for name in tensors.groups:
        base = tensors.base(name).reshape(-1)
        own = {e: tensors.expert(e, name).reshape(-1) for e in experts}
        for start in range(0, base.numel(), _CHUNK):
            b = base[start : start + _CHUNK].to(tensors.device, torch.float32)
            yield {
                e: (t[start : start + _CHUNK].to(tensors.device, torch.float32) - b).to(torch.float64)
                for e, t in own.items()
            }

"""Compatibility of every parameter, from local disagreement and global information content, without training.

For two experts i, j: D = |W_i - W_j| and w_loc = sigmoid(gain z(D) + bias), where z standardises over the tensor. H(W)
is the entropy of a histogram with `bins` equal, half-open bins, and w_glo = a / pi arctan(c sign (H_i - H_j)) + 1/2.
The option ``kind`` selects the scores of (i, j):

    dual         w = 1 - w_glo (1 - w_loc), 1 - w          local   w_loc, 1 - w_loc          global  w_glo, 1 - w_glo
    recommender  exp(u_i), exp(u_j), u_i = w_glo (1 - exp(-w_glo w_loc)), u_j the same with 1 - w_glo, 1 - w_loc

With the option ``order: reversed`` the second expert is i and the first one j.

For any other number of experts: exp(u_i), u_i = sign a z(H_i) - gain z(|W_i - mean W|). The option ``standardise`` says
over what z standardises these distances:

    all          the entries of all experts together: an expert far from the others gets less everywhere. exp(u_i) is
                 divided by its sum over the experts. The presets use this form.
    expert       each expert's own entries, which hides how far it is from the others. The default, so that recipes made
                 before there was another form keep their merges.

With two experts both are the same.

``only`` limits the splice to some groups of tensors, joined by '+' (``head``, ``last`` for the last block, any other
key): the release splices the classification head alone. The other tensors are those of the ``rest``: the first expert,
the last one, or the base. Where one of two experts left a tensor as it was, there is nothing to compare, and the other
expert's tensor is taken whole.

The dual and the global rule prefer opposite entropies in the released code, so `sign` (1 or -1) is an option.
Source: CKI, arXiv 2501.07596, released code. Differs: standardisation, gain and bias replace the learned map, which is
the measure ``cki_learned``. The merge is on deltas, which is the same because the two weights sum to one. Constant
tensors have H = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from merge_search.engine.kernels.numerics import exp, sigmoid
from merge_search.engine.kernels.ranks import counts_from
from merge_search.engine.methods.assess import AssessContext
from merge_search.recipe import Scalar

__all__ = ["distances", "entropy", "numbers", "pair", "reduce", "scores", "shares"]

Rule = Callable[[Tensor], Tensor]
_CHUNK = 2**18


def entropy(weights: Tensor, bins: int) -> float:
    """Return the entropy, in nats, of a histogram with `bins` equal half-open bins between minimum and maximum.

    The maximum itself falls outside, as in the released code. Edges are float64, and comparisons with them exact.
    """
    flat = weights.reshape(-1)
    low, high = (float(v) for v in torch.aminmax(flat))
    if high <= low:
        return 0.0
    step = (high - low) / bins
    edges = torch.tensor(
        [low + b * step for b in range(1, bins)] + [low + bins * step], dtype=torch.float64, device=flat.device
    )
    if flat.dtype != torch.float64:
        edges = _not_below(edges)
    reached = [flat.numel(), *counts_from(flat, edges)]
    shares = [(here - above) / flat.numel() for here, above in pairwise(reached)]
    return -sum(p * math.log(p) for p in shares if p > 0)


def _not_below(edges: Tensor) -> Tensor:
    """Return the smallest float32 that is not below each edge.

    A float32 number is on the same side of it as of the edge.
    """
    nearest = edges.to(torch.float32)
    above = torch.nextafter(nearest, torch.tensor(math.inf, device=edges.device))
    return torch.where(nearest.to(torch.float64) < edges, above, nearest)


def distances(deltas: Sequence[Tensor]) -> list[Tensor]:
    """Return |difference| of two experts for both, or the distance of each one from their mean."""
    if len(deltas) == 2:
        return [(deltas[0] - deltas[1]).abs()] * 2
    mean = deltas[0]
    for t in deltas[1:]:
        mean = mean + t
    mean = mean / float(len(deltas))
    return [(t - mean).abs() for t in deltas]


def reduce(context: AssessContext) -> list[tuple[float, ...]]:
    """Return (entropy of the weights, mean and standard deviation of the disagreement) of each expert."""
    bins = int(context.options["bins"])
    spreads = _spreads(context.deltas)
    return [(entropy(context.base + t, bins), *spread) for t, spread in zip(context.deltas, spreads, strict=True)]


def _spreads(deltas: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Return mean and standard deviation of the disagreement of each expert, computed chunk by chunk in float64."""
    count, mean = 0, [0.0] * len(deltas)
    squares = [0.0] * len(deltas)  # sums of squared distances from the mean
    for parts in zip(*(torch.split(t.reshape(-1), _CHUNK) for t in deltas), strict=True):
        before, n = count, parts[0].numel()
        count += n
        for i, d in enumerate(distances(parts)):
            first = float(d[0])  # subtracted so that the terms are near zero, and exactly zero if all are equal
            x = d.to(torch.float64).sub_(first)
            total = float(x.sum())
            apart = first - mean[i] + total / n
            mean[i] += apart * n / count
            squares[i] += max(0.0, float(x.dot(x)) - total * total / n) + apart * apart * before * n / count
    return [(m, math.sqrt(s / max(1, count))) for m, s in zip(mean, squares, strict=True)]


def numbers(
    options: Mapping[str, Scalar], reduced: Sequence[tuple[float, ...]], n_experts: int, n_active: int
) -> list[float]:
    """Return gain, bias, then (global term, mean, 1 / standard deviation) of each expert."""
    sign, a, c = float(options["sign"]), float(options["a"]), float(options["c"])
    entropies = [r[0] for r in reduced]
    if len(reduced) == 2:
        share = a / math.pi * math.atan(c * sign * (entropies[0] - entropies[1])) + 0.5
        terms = [share, 1 - share]
    else:
        mean = sum(entropies) / len(entropies)
        spread = math.sqrt(sum((h - mean) ** 2 for h in entropies) / len(entropies))
        terms = [sign * a * (h - mean) / spread if spread > 0 else 0.0 for h in entropies]
        if options["standardise"] == "all":
            reduced = _together(reduced)
    result = [float(options["gain"]), float(options["bias"])]
    for term, (_, mean, spread) in zip(terms, reduced, strict=True):
        result += [term, mean, 1.0 / spread if spread > 0 else 0.0]
    return result


def _together(reduced: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Return the numbers of `reduce` with mean and standard deviation over the entries of all experts.

    All experts have the same number of entries.
    """
    mean = sum(r[1] for r in reduced) / len(reduced)
    spread = math.sqrt(sum(r[2] ** 2 + (r[1] - mean) ** 2 for r in reduced) / len(reduced))
    return [(r[0], mean, spread) for r in reduced]


def scores(context: AssessContext) -> list[Tensor]:
    """Return the scores of each expert, float32."""
    kind, n = context.options["kind"], context.numbers
    disagreement = [(d - n[3 + 3 * i]) * n[4 + 3 * i] for i, d in enumerate(distances(context.deltas))]
    if len(context.deltas) == 2:
        if context.options["order"] == "reversed":
            return _two(str(kind), disagreement[1], n, n[5])[::-1]
        return _two(str(kind), disagreement[0], n, n[2])
    use_local, use_global = float(kind != "global"), float(kind != "local")
    logits = [use_global * n[2 + 3 * i] - use_local * (n[0] * z) for i, z in enumerate(disagreement)]
    return [exp(u) for u in logits] if context.options["standardise"] == "expert" else shares(logits)


def shares(logits: Sequence[Tensor], exp: Rule = exp) -> list[Tensor]:
    """Return exp(u_i) / sum_j exp(u_j); the largest u is subtracted first, so that the sum is at least one."""
    peak = logits[0]
    for u in logits[1:]:
        peak = torch.maximum(peak, u)
    parts = [exp(u - peak) for u in logits]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return [part / total for part in parts]


def _two(kind: str, z: Tensor, n: Sequence[Tensor], share: Tensor) -> list[Tensor]:
    """Return the scores of (i, j); `share` is w_glo of i."""
    return pair(kind, sigmoid(n[0] * z + n[1]), share)


def pair(kind: str, local: Tensor, share: Tensor, exp: Rule = exp) -> list[Tensor]:
    """Return the scores of (i, j) from w_loc and w_glo of i.

    Args:
        kind: The option ``kind``.
        local: w_loc.
        share: w_glo, 0-d.
        exp: The exponential function: torch's own where gradients are needed.
    """
    if kind == "local":
        return [local, 1.0 - local]
    if kind == "global":
        return [share.expand(local.shape), (1.0 - share).expand(local.shape)]
    if kind == "recommender":
        other = 1.0 - share
        return [
            exp(share * (1.0 - exp(-share * local))),
            exp(other * (1.0 - exp(-other * (1.0 - local)))),
        ]
    w = 1.0 - share * (1.0 - local)
    return [w, 1.0 - w]

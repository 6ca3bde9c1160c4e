"""The pipeline itself: assess, select, rescale, resolve, splice, combine, for elements in any layout.

Every function is element-wise, so that a whole tensor, a chunk of it and a compiled graph give the same bits. Numbers
arrive as 0-d tensors (float32, int32), never as Python scalars, so that no value is compiled in.
Arithmetic is float32. Sums run over the experts in the order given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from merge_search.engine.codegen.render_c import is_traced
from merge_search.engine.contracts import Source, Structure
from merge_search.engine.kernels.numerics import exp, log
from merge_search.engine.kernels.random_bits import draw, indices, uniform
from merge_search.engine.methods.assess import scores_of
from merge_search.engine.methods.outside import SpliceContext, outside_splice

__all__ = [
    "Survivors",
    "assessed",
    "combine",
    "elect",
    "merge",
    "softmax_weights",
    "survivors",
    "survivors_of",
    "voices",
]

Scalars = Mapping[str, Sequence[Tensor]]
Tensors = Mapping[str, Sequence[Tensor]]


def merge(s: Structure, base: Tensor, experts: Sequence[Tensor], given: Tensors, n: Scalars, index: Tensor) -> Tensor:
    """Merged elements.

    Args:
        base, experts: Same shape, any floating dtype.
        given: Tensors of that shape that `s` asks for: ``a``, ``b``, ``rank``, ``mask``.
        n: Numbers by name, one per expert or one.
        index: int32: position of the first element, 0-d, or of every element.
    Returns:
        float32 of that shape: weights, or the combined delta if ``s.emit == "delta"``.
    """
    origin = base.to(torch.float32)
    left = survivors(s, origin, experts, given, n, index)
    delta = combine(s, origin, left, elect(s, left.x, n), given, n)
    return delta if s.emit == "delta" else origin + n["scale"][0] * delta


def assessed(
    s: Structure, base: Tensor, experts: Sequence[Tensor], given: Tensors, n: Scalars, index: Tensor, form: str
) -> list[Tensor]:
    """Selection scores alone, one tensor per expert; arguments as in `merge`, of a structure that selects nothing.

    Args:
        form: "" as they are, ``log`` their logarithms, ``softmax`` the weights made from them.
    """
    a = survivors(s, base.to(torch.float32), experts, given, n, index).a
    if form and s.assess.kind != "given log":
        a = [log(t) for t in a]
    return softmax_weights([t * n["sharpness"][0] for t in a]) if form == "softmax" else a


class Survivors(NamedTuple):
    """What is left after selection, one tensor per expert.

    Attributes:
        kept: Keep masks m, boolean or soft; None keeps all.
        x: rho m tau. deltas: tau, winsorised. raw: tau as it is. a: selection scores.
        where: int32 positions, where masks need them.
    """

    kept: list[Tensor | None]
    x: list[Tensor]
    deltas: list[Tensor]
    raw: list[Tensor]
    a: list[Tensor]
    where: Tensor | None


def survivors(
    s: Structure, origin: Tensor, experts: Sequence[Tensor], given: Tensors, n: Scalars, index: Tensor
) -> Survivors:
    """Assess, select and rescale; arguments as in `merge`."""
    raw = [e.to(torch.float32) - origin for e in experts]
    deltas = raw
    if s.winsorise:
        deltas = [_winsorised(t, n["clip_low"][i], n["clip_high"][i]) for i, t in enumerate(raw)]
    a = _scores(s.assess, "a", origin, deltas, raw, given, n)
    where = None
    if s.needs_index:
        where = index if index.ndim else indices(origin.numel(), device=origin.device).reshape(origin.shape) + index
    kept, probability = _select(s, a, given, n, where)
    if s.exclusive:
        kept = _exclusive(kept)
    if s.gate:
        chosen = sum(
            (_as_bool(m, a[i]).to(torch.int32) for i, m in enumerate(kept)), torch.zeros_like(a[0], dtype=torch.int32)
        )
        kept = [chosen >= n["gate"][0]] * s.experts
    x = [survivors_of(t, m) for t, m in zip(deltas, kept, strict=True)]
    if s.rescale == "number":
        x = [t * n["rho"][i] for i, t in enumerate(x)]
    elif s.rescale == "probability" and s.select == "rank_probability" and not s.gate and is_traced():
        x = [
            survivors_of(t / p, m) for t, p, m in zip(deltas, probability, kept, strict=True)
        ]  # kept where u < p: p > 0
    elif s.rescale == "probability":
        x = [t / torch.clamp(p, min=_TINY) for t, p in zip(x, probability, strict=True)]
    return Survivors(kept, x, deltas, raw, a, where)


def _winsorised(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    size = torch.clamp(t.abs(), low, high)
    if is_traced():
        return torch.where(t == 0, 0.0, (size.view(torch.int32) | (t.view(torch.int32) & _SIGN)).view(torch.float32))
    return torch.sign(t) * size


def survivors_of(x: Tensor, m: Tensor | None) -> Tensor:
    """m * x for a boolean or soft mask; None keeps everything."""
    if m is None:
        return x
    if m.dtype != torch.bool:
        return m * x
    if is_traced():
        return torch.where(m, x, 0.0)
    return (
        x * m + 0.0
    )  # the same number in a quarter of the time on CPUs; + 0.0 turns a dropped negative's -0.0 into 0.0


def _as_bool(m: Tensor | None, like: Tensor) -> Tensor:
    if m is None:
        return torch.ones_like(like, dtype=torch.bool)
    return m if m.dtype == torch.bool else m > 0


def _as_float(m: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if m is None else m.to(torch.float32)


def _scores(source: Source, slot: str, origin: Tensor, deltas: Sequence[Tensor], raw: Sequence[Tensor], given: Tensors, n: Scalars) -> list[Tensor]:  # fmt: skip
    if source.kind in ("given", "given log"):
        return [t + n[slot][0] for t in given[slot]] if slot in n else list(given[slot])
    if source.kind == "cheap":
        return scores_of(source, origin, deltas, raw, n.get(slot, ()))
    if source.kind == "number":
        return [n[slot][i].expand(origin.shape) for i in range(len(deltas))]
    return [torch.ones_like(origin) for _ in deltas]


def _top(a: Tensor, low: Tensor, high: Tensor, cut: Tensor, place: Tensor) -> Tensor:
    if is_traced():  # each form is twice as fast as the other where it is used
        return a >= torch.where(place <= cut, low, high)
    return (a >= high) | ((a >= low) & (place <= cut))


def _select(
    s: Structure, a: Sequence[Tensor], given: Tensors, n: Scalars, where: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Keep masks, and keep probabilities where the rule has them."""
    every = range(s.experts)
    rank = [r.to(torch.float32) for r in given.get("rank", ())]
    if s.select == "threshold":
        return [a[i] > n["threshold"][0] for i in every], []
    if s.select == "mask":
        return [given["mask"][i] > 0 for i in every], []
    if s.select == "rank":
        return [rank[i] < n["count"][i] for i in every], []
    if s.select == "rank_band":
        return [(rank[i] >= n["drop"][i]) & (rank[i] < n["count"][i]) for i in every], []
    if s.select == "soft_threshold":
        return [_soft(a[i], n["low"][i], n["slope"][i], n["flat"][i]) for i in every], []
    if s.select == "all":
        return [None for _ in every], []
    assert where is not None
    if s.select in ("top_k", "band"):
        place = [where * stride for stride in n["stride"]]
        place = place * (s.experts // len(place))
        different = range(len(n["low"]))  # one where all experts share their scores
        kept: list[Tensor | None] = [_top(a[i], n["low"][i], n["high"][i], n["cut"][i], place[i]) for i in different]
        if s.select == "band":
            peak = [_top(a[i], n["low2"][i], n["high2"][i], n["cut2"][i], place[i]) for i in different]
            kept = [m & ~p for m, p in zip(kept, peak, strict=True) if m is not None]
        return kept * (s.experts // len(kept)), []
    if s.select == "bernoulli":
        return [draw(where, n["key1"][i], n["key2"][i]) < n["limit"][i] for i in every], []
    u = [uniform(where, n["key1"][i], n["key2"][i]) for i in every]
    if s.select == "rank_probability":
        p = [n["first"][i] - n["fall"][i] * rank[i] for i in every]
    else:
        p = [torch.clamp(n["kappa"][i] * a[i], max=1.0) for i in every]
    return [u[i] < p[i] for i in every], p


def _soft(a: Tensor, low: Tensor, slope: Tensor, flat: Tensor) -> Tensor:
    """relu(a - low) slope; where there is no range, `slope` is 0 and `flat` 1: the top scores alone count, fully."""
    if is_traced():
        return torch.where(a >= low, (a - low) * slope + flat, 0.0)
    return torch.clamp(a - low, min=0.0) * slope + (a >= low) * flat


def _exclusive(kept: Sequence[Tensor | None]) -> list[Tensor | None]:
    free: Tensor | None = None
    result: list[Tensor | None] = []
    for m in kept:
        assert m is not None
        result.append(m if free is None else m & free)
        free = ~m if free is None else free & ~m
    return result


def voices(s: Structure, x: Sequence[Tensor], n: Scalars) -> Tensor:
    """What the experts say together at each entry; its sign is the elected one."""
    said = _said(s, x, n)
    return _sum([torch.sign(t) for t in said] if s.resolve == "count" else said)


def _said(s: Structure, x: Sequence[Tensor], n: Scalars) -> list[Tensor]:
    """What each expert votes with: its survivor, times its coefficient where votes are weighted."""
    return [t * n["coefficient"][i] for i, t in enumerate(x)] if s.weighted else list(x)


def elect(s: Structure, x: Sequence[Tensor], n: Scalars) -> list[Tensor | None]:
    """Agreement masks c: an expert agrees where its vote is not zero and has the elected sign; None: all agree."""
    if s.resolve == "none":
        return [None for _ in x]
    total = voices(s, x, n)
    if s.tie == "drop":
        elected = torch.sign(total)
    else:
        tie = n["majority"][0] if s.tie == "majority" else _TIES[s.tie]
        if is_traced():  # the form that is faster where it is used, as in `_top`
            plus = total > (torch.where(tie > 0, -_LEAST, 0.0) if isinstance(tie, Tensor) else -_LEAST * (tie > 0))
            flip = torch.where(plus, 0.0, -0.0).view(torch.int32)  # a sign bit: what is above zero without it agrees
            return [(t.view(torch.int32) ^ flip) > 0 for t in _said(s, x, n)]
        elected = torch.sign(total) + (total == 0) * tie
    return [t * elected > 0 for t in _said(s, x, n)]


_SIGN = -(2**31)
_LEAST = 2.0**-149  # the smallest positive float32
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_TIES = {"plus": 1.0, "minus": -1.0}


def combine(
    s: Structure, origin: Tensor, left: Survivors, agreed: Sequence[Tensor | None], given: Tensors, n: Scalars
) -> Tensor:
    """sum_i omega_i rho_i m_i c_i tau_i. float32."""
    kept, x, deltas, raw, a, where = left
    every = range(s.experts)
    y = [survivors_of(x[i], agreed[i]) for i in every]
    if s.boost:
        y = _boost(y, kept, agreed, n)
    coefficient = [_coefficient(s, i, given, n, where) for i in every]
    if s.outside.measure:
        weight = [_weight(kept[i], agreed[i], x[i]) for i in every]
        b = list(a) if s.mixing.kind == "same" else []
        if s.mixing.kind not in ("none", "same"):
            b = _scores(s.mixing, "b", origin, deltas, raw, given, n)
        return outside_splice(s.outside, SpliceContext(origin, tuple(y), tuple(weight), tuple(coefficient), tuple(b)))
    if s.splice == "sum":
        return _total(coefficient, x if not s.boost else y, agreed)
    if s.splice == "count":
        count = _counted([_alive(kept[i], agreed[i], x[i]) for i in every])
        return _total(coefficient, x if not s.boost else y, agreed) / torch.clamp(count, min=1.0)
    weight = [_weight(kept[i], agreed[i], x[i]) for i in every]
    if s.splice == "mask":
        return _over(_added(coefficient, y, agreed), _sum(weight))
    if s.splice == "coefficient":
        return _over(_added(coefficient, y, agreed), _weighed(coefficient, weight, kept, agreed))
    b = list(a) if s.mixing.kind == "same" else _scores(s.mixing, "b", origin, deltas, raw, given, n)
    if s.splice == "score" and s.mixing.kind == "number" and is_traced():
        parts = y if s.boost else x
        return _over(_added(coefficient, [b[i] * parts[i] for i in every], agreed), _weighed(b, weight, kept, agreed))
    if s.splice == "score":
        return _over(_sum([coefficient[i] * (b[i] * y[i]) for i in every]), _sum([b[i] * weight[i] for i in every]))
    alive = [_alive(kept[i], agreed[i], x[i]) for i in every]
    if s.splice == "softmax":
        logits = b if s.mixing.kind == "given log" else [log(t) for t in b]
        return _softmax([t * n["sharpness"][0] for t in logits], alive, coefficient, y)
    return _argmax(s, [t * w for t, w in zip(b, weight, strict=True)], alive, coefficient, y)


def _coefficient(s: Structure, i: int, given: Tensors, n: Scalars, where: Tensor | None) -> Tensor:
    if not s.rows:
        return n["coefficient"][i]
    assert where is not None
    row = torch.div(where - n["start"][0], n["columns"][0], rounding_mode="floor")
    return n["coefficient"][i] * given["rows"][i][row.to(torch.int64)]


def _alive(m: Tensor | None, c: Tensor | None, like: Tensor) -> Tensor:
    return _as_bool(m, like) if c is None else c  # only survivors agree


def _weight(m: Tensor | None, c: Tensor | None, like: Tensor) -> Tensor:
    """Soft or hard mask of those that agree, float32."""
    if c is None or not _is_hard(m):
        return survivors_of(_as_float(m, like), c)
    return c.to(torch.float32)


def _is_hard(m: Tensor | None) -> bool:
    return m is None or m.dtype == torch.bool


def _weighed(
    factors: Sequence[Tensor], weight: Sequence[Tensor], kept: Sequence[Tensor | None], agreed: Sequence[Tensor | None]
) -> Tensor:
    """Sum of finite factors, each times its weight."""
    if is_traced() and _is_hard(kept[0]) and agreed[0] is not None:
        return _added(factors, [torch.ones_like(w) for w in weight], agreed)
    return _sum([f * w for f, w in zip(factors, weight, strict=True)])


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _total(factors: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Tensor | None]) -> Tensor:
    """`_added`; of elected entries zero is +0."""
    total = _added(factors, x, agreed)
    return total if agreed[0] is None else total.add_(0.0)


def _added(factors: Sequence[Tensor], x: Sequence[Tensor], agreed: Sequence[Tensor | None]) -> Tensor:
    """Sum of factor x entry over those that agree; zero may be -0, which `_over` does not pass on."""
    if agreed[0] is None or not is_traced():
        return _sum([f * survivors_of(t, m) for f, t, m in zip(factors, x, agreed, strict=True)])
    total = torch.zeros_like(x[0])
    for i, (f, t, m) in enumerate(zip(factors, x, agreed, strict=True)):
        assert m is not None
        total = torch.where(m, total + f * t if i else f * t, total)
    return total


def _counted(alive: Sequence[Tensor]) -> Tensor:
    """How many are true. float32."""
    if not is_traced():
        return _sum([m.to(torch.float32) for m in alive])
    count = alive[0].to(torch.float32)
    for m in alive[1:]:
        count = torch.where(m, count + 1.0, count)
    return count


def _over(top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom; zero where bottom is zero."""
    zero = bottom == 0
    if is_traced():
        return torch.where(zero, 0.0, top / bottom) + 0.0
    return top / (bottom + zero) * ~zero + 0.0


def _boost(
    y: Sequence[Tensor], kept: Sequence[Tensor | None], agreed: Sequence[Tensor | None], n: Scalars
) -> list[Tensor]:
    alive = [_alive(m, c, t) for m, c, t in zip(kept, agreed, y, strict=True)]
    alone = _counted(alive) == 1.0
    return [torch.where(alone, t * n["boost"][i], t) for i, t in enumerate(y)]


def _softmax(
    logits: Sequence[Tensor], alive: Sequence[Tensor], coefficient: Sequence[Tensor], y: Sequence[Tensor]
) -> Tensor:
    weight = softmax_weights([torch.where(m, u, -torch.inf) for u, m in zip(logits, alive, strict=True)])
    return _over(_sum([c * (w * t) for c, w, t in zip(coefficient, weight, y, strict=True)]), _sum(weight))


def softmax_weights(logits: Sequence[Tensor]) -> list[Tensor]:
    """exp(u_i - max_j u_j) of each; 0 for -infinity. float32."""
    peak = logits[0]
    for u in logits[1:]:
        peak = torch.maximum(peak, u)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    return [exp(u - peak) for u in logits]


def _argmax(
    s: Structure, b: Sequence[Tensor], alive: Sequence[Tensor], coefficient: Sequence[Tensor], y: Sequence[Tensor]
) -> Tensor:
    b = [torch.clamp(t, max=_HUGE) for t in b]  # infinity times zero is not a number
    taken, best, winner = alive[0], b[0] * alive[0], coefficient[0] * y[0]
    for i in range(1, len(b)):
        better = b[i] > best if s.ties == "first" else b[i] >= best
        wins = alive[i] & (better | ~taken)
        winner, best, taken = (
            torch.where(wins, coefficient[i] * y[i], winner),
            torch.where(wins, b[i], best),
            taken | alive[i],
        )
    return winner

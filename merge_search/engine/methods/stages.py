"""The formulas of a pass: assess, select, rescale, resolve, splice, combine, for elements in any layout.

    merged = base + scale * sum_i omega_i rho_i m_i c_i tau_i

    tau_i    delta of expert i, winsorised if the recipe says so
    a_i      selection scores               b_i      mixing scores
    m_i      keep masks, boolean or soft    rho_i    rescaling of the survivors
    c_i      agreement masks                omega_i  weights of the splice; lambda_i: coefficients

Every function is element-wise, so that a whole tensor, a chunk of it and a compiled loop give the same bits. Numbers
arrive as 0-d tensors (float32, int32), never as Python scalars, so that no value is compiled in. Arithmetic is float32.
Sums run over the experts in the order given. `ops` is the set of steps with two forms, for torch or for a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merge_search.engine.contracts import Source, Structure
from merge_search.engine.kernels.numerics import exp, log
from merge_search.engine.kernels.random_bits import draw, indices, uniform
from merge_search.engine.methods.assess import scores_of
from merge_search.engine.methods.outside import SpliceContext, outside_splice
from merge_search.engine.methods.primitives import Mask, Primitives, total_of
from merge_search.rules import SPLICES

__all__ = ["Survivors", "assessed", "combine", "elect", "merge", "softmax_weights", "survivors", "voices"]

Scalars = Mapping[str, Sequence[Tensor]]
Tensors = Mapping[str, Sequence[Tensor]]


def merge(
    s: Structure, base: Tensor, experts: Sequence[Tensor], given: Tensors, n: Scalars, index: Tensor, ops: Primitives
) -> Tensor:
    """Merged elements.

    Args:
        s: Which rules run.
        base: Any floating dtype.
        experts: Of the base's shape, any floating dtype.
        given: Tensors of that shape that `s` asks for: ``a``, ``b``, ``rank``, ``mask``.
        n: Numbers by name, one per expert or one.
        index: int32: position of the first element, 0-d, or of every element.
        ops: Steps for torch or for a compiler.

    Returns:
        float32 of that shape: weights, or the combined delta if ``s.emit == "delta"``.
    """
    origin = base.to(torch.float32)
    left = survivors(s, origin, experts, given, n, index, ops)
    delta = combine(s, origin, left, elect(s, left.x, n, ops), given, n, ops)
    return delta if s.emit == "delta" else origin + n["scale"][0] * delta


def assessed(
    s: Structure,
    base: Tensor,
    experts: Sequence[Tensor],
    given: Tensors,
    n: Scalars,
    index: Tensor,
    form: str,
    ops: Primitives,
) -> list[Tensor]:
    """Selection scores alone, one tensor per expert.

    Args:
        s: A structure that selects nothing; the other arguments are those of `merge`.
        form: "" for the scores, ``log`` for their logarithms, ``softmax`` for the weights made from those.
    """
    a = survivors(s, base.to(torch.float32), experts, given, n, index, ops).a
    if form and s.assess.kind != "given log":
        a = [log(t) for t in a]
    return softmax_weights([t * n["sharpness"][0] for t in a]) if form == "softmax" else a


# ------------------------------------------------------------------------------------------------ assess and select


class Survivors(NamedTuple):
    """The deltas after selection, one tensor per expert.

    Attributes:
        kept: Keep masks m, boolean or soft; None keeps all.
        x: rho m tau.
        deltas: tau, winsorised.
        raw: Deltas as they are.
        a: Selection scores.
        where: int32 positions, where masks need them.
    """

    kept: list[Mask]
    x: list[Tensor]
    deltas: list[Tensor]
    raw: list[Tensor]
    a: list[Tensor]
    where: Tensor | None


def survivors(
    s: Structure, origin: Tensor, experts: Sequence[Tensor], given: Tensors, n: Scalars, index: Tensor, ops: Primitives
) -> Survivors:
    """Assess, select and rescale; arguments as in `merge`, `origin` is the base in float32."""
    raw = [e.to(torch.float32) - origin for e in experts]
    deltas = raw
    if s.winsorise:
        deltas = [ops.winsorise(t, n["clip_low"][i], n["clip_high"][i]) for i, t in enumerate(raw)]
    a = _scores(s.assess, "a", origin, deltas, raw, given, n)
    where = None
    if s.needs_index:
        where = index if index.ndim else indices(origin.numel(), device=origin.device).reshape(origin.shape) + index
    kept, probability = _SELECTIONS[s.select](_Scored(s.experts, a, given, n, where, ops))
    if s.exclusive:
        kept = _exclusive(kept)
    if s.gate:
        kept = _gated(kept, a, n["gate"][0])
    x = [ops.keep(t, m) for t, m in zip(deltas, kept, strict=True)]
    if s.rescale == "number":
        x = [t * n["rho"][i] for i, t in enumerate(x)]
    elif s.rescale == "probability":
        is_positive = s.select == "rank_probability" and not s.gate  # kept where u < p
        rows = zip(deltas, x, probability, kept, strict=True)
        x = [ops.per_probability(t, entry, p, m, is_positive=is_positive) for t, entry, p, m in rows]
    return Survivors(kept, x, deltas, raw, a, where)


def _scores(
    source: Source,
    slot: str,
    origin: Tensor,
    deltas: Sequence[Tensor],
    raw: Sequence[Tensor],
    given: Tensors,
    n: Scalars,
) -> list[Tensor]:
    """Scores of every expert: selection scores in slot ``a``, mixing scores in slot ``b``."""
    if source.kind in ("given", "given log"):
        return [t + n[slot][0] for t in given[slot]] if slot in n else list(given[slot])
    if source.kind == "cheap":
        return scores_of(source, origin, deltas, raw, n.get(slot, ()))
    if source.kind == "number":
        return [n[slot][i].expand(origin.shape) for i in range(len(deltas))]
    return [torch.ones_like(origin) for _ in deltas]


@dataclass(eq=False)
class _Scored:
    """The inputs of a selection: scores, given tensors, numbers and positions."""

    experts: int
    a: Sequence[Tensor]
    given: Tensors
    n: Scalars
    where: Tensor | None
    ops: Primitives

    @property
    def every(self) -> range:
        return range(self.experts)

    def rank(self, i: int) -> Tensor:
        """Rank of every score of expert i in its row: 0 is the largest."""
        return self.given["rank"][i].to(torch.float32)

    @property
    def positions(self) -> Tensor:
        assert self.where is not None
        return self.where


_Selected = tuple[list[Mask], list[Tensor]]
"""Keep masks, and keep probabilities where the rule has them."""


def _all(t: _Scored) -> _Selected:
    """Everything."""
    return [None for _ in t.every], []


def _threshold(t: _Scored) -> _Selected:
    """a > threshold."""
    return [t.a[i] > t.n["threshold"][0] for i in t.every], []


def _given_mask(t: _Scored) -> _Selected:
    """Masks that were made before the pass."""
    return [t.given["mask"][i] > 0 for i in t.every], []


def _rank(t: _Scored) -> _Selected:
    """rank(a) < count."""
    return [t.rank(i) < t.n["count"][i] for i in t.every], []


def _rank_band(t: _Scored) -> _Selected:
    """drop <= rank(a) < count."""
    return [(t.rank(i) >= t.n["drop"][i]) & (t.rank(i) < t.n["count"][i]) for i in t.every], []


def _soft_threshold(t: _Scored) -> _Selected:
    """max(a - low, 0) slope: a mask between 0 and 1."""
    return [t.ops.soft(t.a[i], t.n["low"][i], t.n["slope"][i], t.n["flat"][i]) for i in t.every], []


def _top_k(t: _Scored) -> _Selected:
    """The k largest scores. Among equal ones, those whose spread-out positions come first."""
    return _of_all(t, _tops(t, "low", "high", "cut")), []


def _band(t: _Scored) -> _Selected:
    """The k largest scores without the very largest."""
    kept, peak = _tops(t, "low", "high", "cut"), _tops(t, "low2", "high2", "cut2")
    return _of_all(t, [m & ~p for m, p in zip(kept, peak, strict=True)]), []


def _tops(t: _Scored, low: str, high: str, cut: str) -> list[Tensor]:
    """One mask per expert, or one alone where all experts share their scores."""
    strides = t.n["stride"]
    place = [t.positions * stride for stride in strides]
    different = range(len(t.n["low"]))
    return [t.ops.top(t.a[i], t.n[low][i], t.n[high][i], t.n[cut][i], place[i % len(place)]) for i in different]


def _of_all(t: _Scored, masks: Sequence[Mask]) -> list[Mask]:
    """A mask for every expert: its own, or the one that all share."""
    return [masks[i % len(masks)] for i in t.every]


def _bernoulli(t: _Scored) -> _Selected:
    """u < density, in whole numbers."""
    return [draw(t.positions, t.n["key1"][i], t.n["key2"][i]) < t.n["limit"][i] for i in t.every], []


def _rank_probability(t: _Scored) -> _Selected:
    """u < p, p falling with the rank."""
    return _at_random(t, [t.n["first"][i] - t.n["fall"][i] * t.rank(i) for i in t.every])


def _proportional(t: _Scored) -> _Selected:
    """u < p, p = min(kappa a, 1)."""
    return _at_random(t, [torch.clamp(t.n["kappa"][i] * t.a[i], max=1.0) for i in t.every])


def _at_random(t: _Scored, p: list[Tensor]) -> _Selected:
    u = [uniform(t.positions, t.n["key1"][i], t.n["key2"][i]) for i in t.every]
    return [u[i] < p[i] for i in t.every], p


_SELECTIONS: dict[str, Callable[[_Scored], _Selected]] = {
    "all": _all,
    "threshold": _threshold,
    "mask": _given_mask,
    "rank": _rank,
    "rank_band": _rank_band,
    "soft_threshold": _soft_threshold,
    "top_k": _top_k,
    "band": _band,
    "bernoulli": _bernoulli,
    "rank_probability": _rank_probability,
    "proportional": _proportional,
}
"""Selections by `Structure.select`. Rules with other names make masks before the pass and run as ``mask``."""


def _exclusive(kept: Sequence[Mask]) -> list[Mask]:
    """Each expert keeps only entries that no expert before it kept."""
    free: Tensor | None = None
    result: list[Mask] = []
    for m in kept:
        assert m is not None
        result.append(m if free is None else m & free)
        free = ~m if free is None else free & ~m
    return result


def _gated(kept: Sequence[Mask], a: Sequence[Tensor], least: Tensor) -> list[Mask]:
    """Entries that at least so many experts keep, for all experts alike."""
    counts = [_as_bool(m, a[i]).to(torch.int32) for i, m in enumerate(kept)]
    gate = sum(counts, torch.zeros_like(a[0], dtype=torch.int32)) >= least
    return [gate for _ in kept]


def _as_bool(m: Mask, like: Tensor) -> Tensor:
    if m is None:
        return torch.ones_like(like, dtype=torch.bool)
    return m if m.dtype == torch.bool else m > 0


# ------------------------------------------------------------------------------------------------ resolve


def voices(s: Structure, x: Sequence[Tensor], n: Scalars) -> Tensor:
    """The experts' votes at each entry, added up; the sign is the elected one."""
    votes = _votes(s, x, n)
    return total_of([torch.sign(t) for t in votes] if s.resolve == "count" else votes)


def _votes(s: Structure, x: Sequence[Tensor], n: Scalars) -> list[Tensor]:
    """Each expert's vote: its survivor, times its coefficient where votes are weighted."""
    return [t * n["coefficient"][i] for i, t in enumerate(x)] if s.weighted else list(x)


def elect(s: Structure, x: Sequence[Tensor], n: Scalars, ops: Primitives) -> list[Mask]:
    """Agreement masks c: an expert agrees where its vote is not zero and has the elected sign; None: all agree."""
    if s.resolve == "none":
        return [None for _ in x]
    total = voices(s, x, n)
    if s.tie == "drop":
        elected = torch.sign(total)
        return [t * elected > 0 for t in _votes(s, x, n)]
    tie = n["majority"][0] if s.tie == "majority" else _TIES[s.tie]
    return list(ops.agreements(_votes(s, x, n), total, tie))


_TIES = {"plus": 1.0, "minus": -1.0}


# ------------------------------------------------------------------------------------------------ splice and combine


def combine(
    s: Structure,
    origin: Tensor,
    left: Survivors,
    agreed: Sequence[Mask],
    given: Tensors,
    n: Scalars,
    ops: Primitives,
) -> Tensor:
    """sum_i omega_i rho_i m_i c_i tau_i. float32; `agreed` is from `elect`, other arguments as in `survivors`."""
    y = [ops.keep(t, m) for t, m in zip(left.x, agreed, strict=True)]
    if s.boost:
        y = _boost(y, left.kept, agreed, n, ops)
    b: Sequence[Tensor] = ()
    if s.mixing.kind == "same":
        b = left.a
    elif s.splice in _SCORED or (s.outside.measure and s.mixing.kind != "none"):
        b = _scores(s.mixing, "b", origin, left.deltas, left.raw, given, n)
    coefficient = [_coefficient(s, i, given, n, left.where) for i in range(s.experts)]
    agreement = _Agreed(s, left.kept, agreed, coefficient, left.x, y, b, n, ops)
    if s.outside.measure:
        inputs = SpliceContext(origin, tuple(y), tuple(agreement.weight()), tuple(coefficient), tuple(b))
        return outside_splice(s.outside, inputs)
    return _SPLICES[s.splice](agreement)


@dataclass(eq=False)
class _Agreed:
    """The inputs of a splice, one of each per expert.

    Attributes:
        kept: Keep masks m.
        agreed: Agreement masks c.
        coefficient: lambda, or a tensor of them where it differs by row.
        x: rho m tau.
        y: rho m c tau, boosted where one expert is alone.
        b: Mixing scores of splices that have them.
    """

    s: Structure
    kept: Sequence[Mask]
    agreed: Sequence[Mask]
    coefficient: Sequence[Tensor]
    x: Sequence[Tensor]
    y: Sequence[Tensor]
    b: Sequence[Tensor]
    n: Scalars
    ops: Primitives

    @property
    def entries(self) -> Sequence[Tensor]:
        """Survivors to add up, where adding takes those that agree."""
        return self.y if self.s.boost else self.x

    def alive(self) -> list[Tensor]:
        """Whether an expert takes part in an entry."""
        return [_alive(m, c, t) for m, c, t in zip(self.kept, self.agreed, self.x, strict=True)]

    def weight(self) -> list[Tensor]:
        """m c, float32."""
        return [self._weight(m, c, t) for m, c, t in zip(self.kept, self.agreed, self.x, strict=True)]

    def _weight(self, m: Mask, c: Mask, like: Tensor) -> Tensor:
        if c is not None and _is_hard(m):
            return c.to(torch.float32)  # only survivors agree
        return self.ops.keep(torch.ones_like(like) if m is None else m.to(torch.float32), c)

    def total(self) -> Tensor:
        """sum lambda y; of elected entries zero is +0."""
        total = self.ops.added(self.coefficient, self.entries, self.agreed)
        return total if self.agreed[0] is None else total.add_(0.0)

    def weighed(self, factors: Sequence[Tensor]) -> Tensor:
        """sum f m c for finite factors f."""
        masks = self.agreed if _is_hard(self.kept[0]) else [None] * len(self.agreed)
        return self.ops.weighed(factors, self.weight(), masks)


def _splice_sum(t: _Agreed) -> Tensor:
    """sum lambda y."""
    return t.total()


def _splice_count(t: _Agreed) -> Tensor:
    """sum lambda y / max(number that agree, 1)."""
    return t.total() / torch.clamp(t.ops.counted(t.alive()), min=1.0)


def _splice_mask(t: _Agreed) -> Tensor:
    """sum lambda y / sum m c."""
    return t.ops.over(t.ops.added(t.coefficient, t.entries, t.agreed), total_of(t.weight()))


def _splice_coefficient(t: _Agreed) -> Tensor:
    """sum lambda y / sum lambda m c."""
    return t.ops.over(t.ops.added(t.coefficient, t.entries, t.agreed), t.weighed(t.coefficient))


def _splice_score(t: _Agreed) -> Tensor:
    """sum lambda b y / sum b m c."""
    if t.s.mixing.kind == "number":  # finite, so that entries that do not agree can be left out
        return t.ops.over(t.ops.added_scores(t.coefficient, t.b, t.entries, t.agreed), t.weighed(t.b))
    top = [lam * (b * y) for lam, b, y in zip(t.coefficient, t.b, t.y, strict=True)]
    return t.ops.over(total_of(top), total_of([b * w for b, w in zip(t.b, t.weight(), strict=True)]))


def _splice_softmax(t: _Agreed) -> Tensor:
    """sum lambda w y / sum w, w = exp(sharpness log b) of those that take part."""
    logits = t.b if t.s.mixing.kind == "given log" else [log(b) for b in t.b]
    sharp = [u * t.n["sharpness"][0] for u in logits]
    weight = softmax_weights([torch.where(m, u, -torch.inf) for u, m in zip(sharp, t.alive(), strict=True)])
    top = [lam * (w * y) for lam, w, y in zip(t.coefficient, weight, t.y, strict=True)]
    return t.ops.over(total_of(top), total_of(weight))


def _splice_argmax(t: _Agreed) -> Tensor:
    """lambda y of the expert with the largest b m c among those that take part."""
    alive = t.alive()
    # infinity times zero is not a number
    b = [torch.clamp(score * w, max=_HUGE) for score, w in zip(t.b, t.weight(), strict=True)]
    taken, best, winner = alive[0], b[0] * alive[0], t.coefficient[0] * t.y[0]
    for i in range(1, len(b)):
        better = b[i] > best if t.s.ties == "first" else b[i] >= best
        wins = alive[i] & (better | ~taken)
        winner = torch.where(wins, t.coefficient[i] * t.y[i], winner)
        best, taken = torch.where(wins, b[i], best), taken | alive[i]
    return winner


_HUGE = torch.finfo(torch.float32).max

_SPLICES: dict[str, Callable[[_Agreed], Tensor]] = {
    "sum": _splice_sum,
    "count": _splice_count,
    "mask": _splice_mask,
    "coefficient": _splice_coefficient,
    "score": _splice_score,
    "softmax": _splice_softmax,
    "argmax": _splice_argmax,
}
"""Splices by `Structure.splice`."""
_SCORED = tuple(kind for kind in _SPLICES if SPLICES[kind].is_scored)


def softmax_weights(logits: Sequence[Tensor]) -> list[Tensor]:
    """exp(u_i - max_j u_j) of each; 0 for -infinity. float32."""
    peak = logits[0]
    for u in logits[1:]:
        peak = torch.maximum(peak, u)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    return [exp(u - peak) for u in logits]


def _coefficient(s: Structure, i: int, given: Tensors, n: Scalars, where: Tensor | None) -> Tensor:
    """lambda_i, or where a map gives one per output row, a tensor of them."""
    if not s.rows:
        return n["coefficient"][i]
    assert where is not None
    row = torch.div(where - n["start"][0], n["columns"][0], rounding_mode="floor")
    return n["coefficient"][i] * given["rows"][i][row.to(torch.int64)]


def _boost(
    y: Sequence[Tensor], kept: Sequence[Mask], agreed: Sequence[Mask], n: Scalars, ops: Primitives
) -> list[Tensor]:
    """Entries where one expert is alone, times that expert's boost."""
    alone = ops.counted([_alive(m, c, t) for m, c, t in zip(kept, agreed, y, strict=True)]) == 1.0
    return [torch.where(alone, t * n["boost"][i], t) for i, t in enumerate(y)]


def _alive(m: Mask, c: Mask, like: Tensor) -> Tensor:
    return _as_bool(m, like) if c is None else c  # only survivors agree


def _is_hard(m: Mask) -> bool:
    return m is None or m.dtype == torch.bool

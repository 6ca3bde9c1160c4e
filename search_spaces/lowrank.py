"""Coefficients of expert x block x module kind as a sum of a few products.

    coefficient(i, l, k) = sum over r of  strength(i, r) * depth(r, l) * kind(r, k)

`depth` is linear between `knots` blocks. The parametrisation is fixed so that different points mean different merges:

- ``kind`` is 1 for the reference kind: attention, or else the first kind that is not a norm gain.
- Each term has an anchor knot. Its own ``depth`` is 1 there, and that of all other terms is 0. So a strength is itself
  a coefficient: that of its expert at the anchor in the reference kind. The anchor of a single term is the middle of
  the model. Two terms have their anchors at the first and the last block.

This settles the signs, scales and order of the terms. A separate mean is not needed, because the sum can express
constant factors already. Only a set of measure zero is left: where a term's strengths vanish for all experts, or where
terms are proportional, its other factors have no effect.

Tensors outside blocks follow the first block (embeddings) or the last (all others), in the reference kind.

Dimension: R * (M + (knots - R) + (K - 1)) for M experts, K kinds and rank R.
Source: The CP form of adapters in PETAL (arXiv 2312.12458), here for coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from merge_search.errors import SpaceError
from merge_search.recipe import Group
from merge_search.space import Float, Parameter, Point, SpaceContext
from search_spaces.depth_curve import KNOTS, knot_positions
from search_spaces.parts.axes import Read, curve, settle
from search_spaces.parts.composed import Composed, Values
from search_spaces.parts.grouping import Slots
from search_spaces.parts.one_method import OneMethod, method_and_density
from search_spaces.parts.options import Bounds, space_options

__all__ = ["LowRank"]


class LowRankOptions(OneMethod):
    """Options of ``type: lowrank``. ``bounds`` are those of strengths.

    Attributes:
        rank: The number of terms.
        knots: Knots of the depth factors; None: four, or one per block or term if that is needed.
        profile: Bounds of depth and kind factors relative to their anchors.
    """

    rank: Annotated[int, Field(ge=1)] = 1
    knots: Annotated[int, Field(ge=2)] | None = None
    profile: Bounds = (0.3, 1.7)


class LowRank(Composed):
    """Parameters: ``strength.EXPERT``, ``depth.knot.J``, ``kind.KIND``.

    With rank > 1: ``strength.EXPERT.R``, ``depth.R.knot.J``, ``kind.R.KIND``.
    """

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen = space_options(LowRankOptions, options)
        method, density = method_and_density(chosen, context)
        depth, experts = context.n_blocks, len(context.experts)
        problems = []
        if depth < 2:
            problems.append(
                f"space: factors over depth need at least 2 blocks, and the models have {depth}; use type: uniform"
            )
        elif chosen.knots is not None and chosen.knots > depth:
            problems.append(f"space.knots: at most one knot per block, {depth} here, got {chosen.knots}")
        knots = max(1, min(chosen.knots or max(KNOTS, chosen.rank), depth))
        largest = min(knots, experts)
        if chosen.rank > largest:
            problems.append(
                f"space.rank: at most the number of experts and of knots, {largest} here, got {chosen.rank}"
            )
        if not chosen.profile[0] <= 1 <= chosen.profile[1] or chosen.profile[0] <= 0:
            problems.append(
                f"space.profile: must be positive and hold 1, the value at the anchors, got {list(chosen.profile)}"
            )
        if problems:
            raise SpaceError(problems)
        axis = _Factors(context, chosen, knot_positions(knots, depth))
        super().__init__(context, [method], axis, density, advice="fewer knots or a lower rank make it smaller")


class _Factors:
    """The axis of coefficients; see the module's docstring."""

    def __init__(self, context: SpaceContext, chosen: LowRankOptions, knots: Sequence[int]) -> None:
        self.bounds = chosen.bounds
        self._experts, self._knots, self._terms = context.experts, knots, range(chosen.rank)
        self._anchors = knot_positions(chosen.rank, len(knots)) if chosen.rank > 1 else [(len(knots) - 1) // 2]
        self._kinds = _kinds(context, [knots[a] for a in self._anchors])
        self._slots = Slots(context, self._cell)
        self._depth = context.n_blocks
        self._curve = {b: curve(knots, self._depth, Group("", b, "")) for b in range(self._depth)}
        low, high = chosen.profile
        self._profile = (low if chosen.rank == 1 else 0.0, high)
        self._free = [q for q in range(len(knots)) if q not in self._anchors]
        strength, depth, kind = Float(*chosen.bounds), Float(*self._profile), Float(low, high)
        self.parameters: dict[str, Parameter] = {}
        for r in self._terms:
            self.parameters |= {self._name("strength", r, e): strength for e in self._experts}
            self.parameters |= {self._name("depth", r, f"knot.{q}"): depth for q in self._free}
            self.parameters |= {self._name("kind", r, k): kind for k in self._kinds[1:]}

    def _name(self, what: str, term: int, which: str) -> str:
        if len(self._terms) == 1:
            return f"{what}.{which}"
        return f"{what}.{which}.{term}" if what == "strength" else f"{what}.{term}.{which}"

    def _cell(self, group: Group) -> tuple[int, str]:
        reference = self._kinds[0]
        if group.block is None:
            return (0 if group.kind == "embedding" else self._knots[-1], reference)
        return (group.block, group.kind if group.kind in self._kinds else reference)

    def values(self, point: Point) -> dict[str, float | dict[str, float]]:
        factors = [self._factor(r, point) for r in self._terms]
        out = {}
        for e in self._experts:
            strengths = [float(point[self._name("strength", r, e)]) for r in self._terms]
            numbers = {
                (b, k): sum(s * (u[b] * v[k]) for s, (u, v) in zip(strengths, factors, strict=True))
                for b, k in self._slots.labels
            }
            out[e] = self._slots.spread(numbers)
        return out

    def _factor(self, term: int, point: Point) -> tuple[dict[int, float], dict[str, float]]:
        """The depth factor of each block and the kind factor of each kind."""
        at = {f"knot.{q}": float(q == self._anchors[term]) for q in self._anchors}
        at |= {f"knot.{q}": float(point[self._name("depth", term, f"knot.{q}")]) for q in self._free}
        depth = {b: _between(mix, at) for b, mix in self._curve.items()}
        kind = {k: float(point[self._name("kind", term, k)]) for k in self._kinds[1:]}
        return depth, {self._kinds[0]: 1.0, **kind}

    def read(self, value: Read) -> Values:
        first = self._slots.first
        out: Values = {}
        weights: list[dict[tuple[str, str], float]] = []
        for r in self._terms:
            block = self._knots[self._anchors[r]]
            strengths = {e: value(e, first[block, self._kinds[0]]) for e in self._experts}
            out |= {self._name("strength", r, e): s for e, s in strengths.items()}
            loudest = max(strengths, key=lambda e: abs(strengths[e]))
            kinds = {self._kinds[0]: 1.0}
            for k in self._kinds[1:]:
                s = strengths[loudest]
                kinds[k] = settle(
                    value(loudest, first[block, k]) / s if s else 1.0,
                    *_finite(self.parameters, self._name("kind", r, k)),
                )
                out[self._name("kind", r, k)] = kinds[k]
            weights.append({(e, k): strengths[e] * kinds[k] for e in self._experts for k in self._kinds})
        for q in self._free:
            usual = self._usual(q)
            cells = [(e, k) for e in self._experts for k in self._kinds if (self._knots[q], k) in first]
            rows = [[w[c] for w in weights] for c in cells]
            target = [value(e, first[self._knots[q], k]) for e, k in cells]
            for r, u in enumerate(_least_squares(rows, target, usual)):
                out[self._name("depth", r, f"knot.{q}")] = settle(u, *self._profile)
        return {name: out[name] for name in self.parameters}

    def _usual(self, knot: int) -> list[float]:
        """Depth factors of a uniform recipe: linear between the anchors, so they sum to one."""
        mix = (
            dict(curve(self._anchors, len(self._knots), Group("", knot, "")))
            if len(self._terms) > 1
            else {"knot.0": 1.0}
        )
        return [mix.get(f"knot.{r}", 0.0) for r in self._terms]

    def uniform(self, level: float) -> Values:
        level = min(max(level, self.bounds[0]), self.bounds[1])
        out: Values = {n: level if n.startswith("strength.") else 1.0 for n in self.parameters}
        for q in self._free:
            out |= {self._name("depth", r, f"knot.{q}"): u for r, u in enumerate(self._usual(q))}
        return out


def _kinds(context: SpaceContext, anchors: Sequence[int]) -> list[str]:
    """The kinds with a factor of their own: those that every anchor block has. The reference kind comes first."""
    at = {b: {g.kind for g in context.groups if g.block == b} for b in anchors}
    everywhere = [k for k in context.kinds if all(k in kinds for kinds in at.values())]
    if not everywhere:
        raise SpaceError(
            f"space: blocks {', '.join(map(str, anchors))} have no module kind in common; use type: depth_curve"
        )
    return sorted(everywhere, key=lambda k: (k != "attention", k == "norm", everywhere.index(k)))


def _between(mix: Sequence[tuple[str, float]], at: Mapping[str, float]) -> float:
    """The weighted mean of the factors at the knots. Exact where both are equal."""
    origin = at[mix[0][0]]
    return origin + sum(w * (at[s] - origin) for s, w in mix[1:])


def _finite(parameters: Mapping[str, Parameter], name: str) -> tuple[float, float]:
    domain = parameters[name]
    assert isinstance(domain, Float)
    return domain.low, domain.high


def _least_squares(rows: Sequence[Sequence[float]], target: Sequence[float], usual: list[float]) -> list[float]:
    """The x that minimises |rows x - target|. If several do, it is the one nearest to `usual`."""
    n = len(usual)
    rest = [t - sum(w * u for w, u in zip(row, usual, strict=True)) for row, t in zip(rows, target, strict=True)]
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(n)] for i in range(n)]
    size = sum(gram[i][i] for i in range(n))
    if size == 0:
        return usual
    for i in range(n):
        gram[i][i] += 1e-13 * size if n > 1 else 0.0
    right = [sum(row[i] * t for row, t in zip(rows, rest, strict=True)) for i in range(n)]
    return [u + d for u, d in zip(usual, _solve(gram, right), strict=True)]


def _solve(a: list[list[float]], b: list[float]) -> list[float]:
    """Solve a x = b by Gaussian elimination. `a` is symmetric and positive definite, so no pivot vanishes."""
    n = len(b)
    a, b = [row[:] for row in a], b[:]
    for i in range(n):
        for j in range(i + 1, n):
            f = a[j][i] / a[i][i]
            a[j] = [y - f * x for x, y in zip(a[i], a[j], strict=True)]
            b[j] -= f * b[i]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (b[i] - sum(a[i][j] * x[j] for j in range(i + 1, n))) / a[i][i]
    return x

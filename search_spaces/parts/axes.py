"""Axes: numbers per expert and tensor, computed from a few parameters, and the way back to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from merge_search.errors import SpaceError
from merge_search.recipe import Group
from merge_search.space import Float, Parameter, Point, SpaceContext
from search_spaces.parts.grouping import DensityRange, Range, Slots, cell

__all__ = ["Axis", "Linear", "Mix", "Read", "curve", "per_cell", "settle"]

Read = Callable[[str, Group], float]
"""(expert, group) -> the number in a recipe."""

Mix = tuple[tuple[str, float], ...]
"""A tensor's number as a weighted mean of parameters: suffixes of their names, with weights that sum to one."""


class Axis(Protocol):
    """Coefficients (or densities) of all experts as a function of parameters."""

    bounds: tuple[float, float]

    @property
    def parameters(self) -> Mapping[str, Parameter]: ...

    def values(self, point: Point) -> dict[str, float | dict[str, float]]:
        """The numbers of each expert, in the form that recipes have."""
        ...

    def read(self, value: Read) -> dict[str, str | int | float | bool]:
        """The parameters that give these numbers, if any do. The caller checks that by decoding."""
        ...

    def uniform(self, level: float) -> dict[str, str | int | float | bool]:
        """The parameters that give every expert and tensor the number `level`, or the nearest number within bounds."""
        ...


class Linear:
    """An axis on which every tensor's number is one parameter of its expert, or a weighted mean of several.

    Args:
        what: The first part of the parameters' names: ``coefficient`` or ``density``.
        context: The models of the study.
        mix: Group -> its `Mix`.
        bounds: The bounds of every parameter, and so of every number.
        log: Whether parameters are searched on a logarithmic scale.
        experts: The experts that have these numbers; None: all experts.
        shared: Whether all experts share one set of parameters.
        fixed: The number of every tensor, if it is not searched: the axis then has no parameters.
    """

    def __init__(
        self,
        what: str,
        context: SpaceContext,
        mix: Callable[[Group], Mix],
        bounds: tuple[float, float],
        *,
        log: bool = False,
        experts: Sequence[str] | None = None,
        shared: bool = False,
        fixed: float | None = None,
    ) -> None:
        self._fixed = fixed
        self.bounds = bounds
        self.experts = context.experts if experts is None else tuple(experts)
        self._slots = Slots(context, mix)
        self._order = _solving_order(self._slots.labels)
        suffixes = list(dict.fromkeys(s for label in self._slots.labels for s, _ in label))
        owners = {e: what if shared else f"{what}.{e}" for e in self.experts}
        self._names = {
            e: {s: owner if s == "" or len(suffixes) == 1 else f"{owner}.{s}" for s in suffixes}
            for e, owner in owners.items()
        }
        domain = Float(*bounds, log=log)
        searched = [n for names in self._names.values() for n in names.values()] if fixed is None else []
        self.parameters: dict[str, Parameter] = dict.fromkeys(searched, domain)

    def values(self, point: Point) -> dict[str, float | dict[str, float]]:
        if self._fixed is not None:
            return dict.fromkeys(self._names, self._fixed)
        out = {}
        for expert, names in self._names.items():
            x = {suffix: float(point[name]) for suffix, name in names.items()}
            out[expert] = self._slots.spread({label: _mean(label, x) for label in self._slots.labels})
        return out

    def read(self, value: Read) -> dict[str, str | int | float | bool]:
        out: dict[str, str | int | float | bool] = {}
        if self._fixed is not None:
            return out
        for expert, names in self._names.items():
            x: dict[str, float] = {}
            for suffix, label in self._order:
                v = value(expert, self._slots.first[label])
                weight = dict(label)[suffix]
                if weight != 1.0:
                    v = settle((v - sum(w * x[s] for s, w in label if s != suffix)) / weight, *self.bounds)
                x[suffix] = v
            out |= {names[suffix]: v for suffix, v in x.items()}
        return out

    def uniform(self, level: float) -> dict[str, str | int | float | bool]:
        return dict.fromkeys(self.parameters, min(max(level, self.bounds[0]), self.bounds[1]))


def _mean(label: Mix, x: Mapping[str, float]) -> float:
    """The weighted mean of the parameters. Exact where all of them are equal."""
    origin = x[label[0][0]]
    return origin + sum(w * (x[s] - origin) for s, w in label[1:])


def _solving_order(labels: Sequence[Mix]) -> list[tuple[str, Mix]]:
    """An order in which every parameter follows from one tensor and earlier parameters. Largest weights come first."""
    known: set[str] = set()
    order = []
    while True:
        ready = [
            (w, s, label)
            for label in labels
            for s, w in label
            if s not in known and all(other in known or other == s for other, _ in label)
        ]
        if not ready:
            break
        _, suffix, label = max(ready, key=lambda r: r[0])
        order.append((suffix, label))
        known.add(suffix)
    missing = {s for label in labels for s, _ in label} - known
    if missing:
        raise SpaceError(f"space: no tensors tell {', '.join(sorted(missing))} apart; use fewer knots or layer groups")
    return order


def settle(value: float, low: float, high: float) -> float:
    """A solved number, moved onto a bound that it misses by rounding only."""
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    if low - slack <= value < low:
        return low
    return high if high < value <= high + slack else value


def per_cell(what: str, context: SpaceContext, spread: Range | DensityRange, *, shared: bool = False) -> Linear:
    """An axis with one parameter per cell of `spread` and expert, or per cell if it is `shared`."""
    if "block" in spread.per and context.n_blocks == 0:
        raise SpaceError(f"space: per: {spread.per} needs models with blocks, and these have none; write per: expert")
    log, fixed = isinstance(spread, DensityRange), getattr(spread, "fixed", None)
    mix: Callable[[Group], Mix] = lambda g: ((cell(spread.per, g), 1.0),)  # noqa: E731
    return Linear(what, context, mix, spread.bounds, log=log, shared=shared, fixed=fixed)


def curve(positions: Sequence[float], n_blocks: int, group: Group, prefix: str = "knot") -> Mix:
    """Linear interpolation between knots over the block index.

    Embeddings have the number of the first block, and all other tensors outside blocks have that of the last.

    Args:
        positions: Blocks of the knots, increasing from 0 to n_blocks - 1.
        n_blocks: The number of blocks.
        group: The group of a tensor.
        prefix: The first part of the knots' names.
    """
    at = group.block if group.block is not None else (0 if group.kind == "embedding" else n_blocks - 1)
    if len(positions) == 1:
        return ((f"{prefix}.0", 1.0),)
    for j, (low, high) in enumerate(pairwise(positions)):
        if low <= at <= high:
            t = (at - low) / (high - low)
            ends = ((f"{prefix}.{j}", 1.0 - t), (f"{prefix}.{j + 1}", t))
            return tuple((s, w) for s, w in ends if w > 0)
    raise AssertionError(f"block {at} lies outside the knots {list(positions)}")

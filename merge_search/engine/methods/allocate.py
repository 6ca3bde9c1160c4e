"""Densities and coefficients per tensor and expert, after a recipe's `Allocate`.

A recipe gives each expert a density and a coefficient per group. Allocation spreads both over the tensors that the
expert changed, by the importance of each: its mean score under a measure, any of `merge_search.rules.MEASURES` that
can score before selection. Important tensors keep more of their delta:

    density      d + spread (rank - 1/2), clipped to [floor, 1], shifted so that the size-weighted mean stays d
    coefficient  lambda importance^coefficient_power / mean over the tensors of importance^coefficient_power

``rank`` is in [0, 1]. A ``spread`` of 0 and a ``coefficient_power`` of 0 change nothing. Densities count only where the
selection reads them. A study file gives any preset that selects an allocation, fixed or searched:

    presets: [{dare: {allocate: magnitude, spread: {bounds: [0, 0.6]}, coefficient_power: [0, 0.5, 1]}}]

Source: APL, arXiv 2408.09485, for the idea and for alpha, the coefficient's power. Differs: no code was released, and
the map from importance to density is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merge_search.engine.contracts import Tensors
from merge_search.recipe import Recipe

__all__ = ["Allocation", "allocate", "ranks", "spread_densities"]

Importance = Callable[[str, str], float]


@dataclass(frozen=True)
class Allocation:
    """Numbers by (expert, tensor)."""

    density: Mapping[tuple[str, str], float]
    coefficient: Mapping[tuple[str, str], float]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks scaled to [0, 1], equal values sharing their mean; 1/2 for a single value."""
    if len(values) < 2:
        return [0.5] * len(values)
    return [(sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2) / (len(values) - 1) for v in values]


def spread_densities(
    given: Sequence[float], sizes: Sequence[int], importance: Sequence[float], spread: float, floor: float
) -> list[float]:
    """given + spread (rank - 1/2), clipped to [floor, 1] and shifted so that the size-weighted mean stays.

    Source: APL, arXiv 2408.09485: important partitions are dropped less. Differs: the map from rank to density is ours.
    """
    wished = [d + spread * (r - 0.5) for d, r in zip(given, ranks(importance), strict=True)]
    target = sum(d * n for d, n in zip(given, sizes, strict=True))

    def at(shift: float) -> list[float]:
        return [min(1.0, max(floor, d + shift)) for d in wished]

    low, high = -1.0 - abs(spread), 1.0 + abs(spread)
    for _ in range(60):
        middle = (low + high) / 2
        if sum(d * n for d, n in zip(at(middle), sizes, strict=True)) < target:
            low = middle
        else:
            high = middle
    return at(high)


def allocate(
    recipe: Recipe, tensors: Tensors, active: Callable[[str], tuple[str, ...]], importance: Importance
) -> Allocation:
    """Final density and coefficient of every expert for every tensor on which it is active.

    Args:
        active: Tensor -> experts whose delta is not zero.
        importance: (expert, tensor) -> non-negative number; asked for only if the recipe allocates by it.
    """
    density = {(e, name): recipe.density(e, g) for name, g in tensors.groups.items() for e in recipe.models.experts}
    coefficient = {
        (e, name): recipe.coefficient(e, g) for name, g in tensors.groups.items() for e in recipe.models.experts
    }
    rule = recipe.allocate
    if rule.kind == "constant":
        return Allocation(density, coefficient)
    for expert in recipe.models.experts:
        names = [name for name in tensors.groups if expert in active(name)]
        if not names:
            continue
        weights = [importance(expert, name) for name in names]
        sizes = [tensors.base(name).numel() for name in names]
        spread = spread_densities([density[expert, n] for n in names], sizes, weights, rule.spread, rule.floor)
        density.update({(expert, n): d for n, d in zip(names, spread, strict=True)})
        powers = [_power(w, rule.coefficient_power) for w in weights]
        mean = sum(powers) / len(powers)
        if rule.coefficient_power and mean > 0:
            coefficient.update(
                {(expert, n): coefficient[expert, n] * w / mean for n, w in zip(names, powers, strict=True)}
            )
    return Allocation(density, coefficient)


def _power(importance: float, exponent: float) -> float:
    """importance^exponent; 0 where scores below zero make the mean negative and the power is no real number."""
    return importance**exponent if importance >= 0 or exponent == int(exponent) else 0.0

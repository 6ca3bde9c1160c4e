"""The search space of a mergekit-evolve file, bounded and without mirror images.

    space: {type: mergekit_genome, file: evolve.yaml}

or with the ``genome`` section inline. As in mergekit-evolve there is a weight (and for ties and dare_ties a density)
per model, layer group and filter. Embeddings belong to the first layer group, and all other tensors outside the layers
to the last. With ``smooth: true`` numbers run linearly between the layer groups. Three things differ, so that different
points are different merges:

- Weights lie in `weights` instead of being folded by abs (with ``allow_negative_weights`` in [-high, high]).
- Densities lie in `density` instead of being folded and clamped.
- Where the rule divides by the sum of the weights (linear; ties and dare_ties unless ``normalize: false``), only their
  ratios matter. The first model's weight is 1, and those of the others lie in `ratio`, on a logarithmic scale.

Dimension: G * F * (M * P) for G layer groups, F filters, M models and P = 1 or 2 parameters, less G * F if weights are
normalised. Tensors that no filter matches count as one more filter. Combinations without tensors do not count.
Source: The documentation of mergekit-evolve (Arcee AI, LGPL). Random masks are this package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_search.presets import preset
from merge_search.recipe import Group, Rescale, Splice
from merge_search.space import Float, Parameter, Point, SpaceContext
from search_spaces.mergekit_file import DENSITY_METHODS, Genome, MergekitOptions, read_genome
from search_spaces.parts.axes import Linear, Mix, Read, curve
from search_spaces.parts.composed import MOST, Composed, Values
from search_spaces.parts.methods import Method

__all__ = ["MergekitGenome"]

EMPHASES = (3.0, 1 / 3, 2.0, 1 / 2, 5.0, 1 / 5)
"""Weights of one model relative to the others in some of the initial points of normalised rules."""


class MergekitGenome(Composed):
    """Parameters: ``weight.EXPERT[.layers.J][.FILTER]`` and ``density.EXPERT...``.

    Normalised rules have relative weights, from the second model on.
    """

    def __init__(self, options: Mapping[str, Any], context: SpaceContext, *, folder: Path | None = None) -> None:
        chosen, genome, experts, notes = read_genome(options, context, folder)
        mix = _mix(genome, context)
        weights: Linear | _Relative
        if genome.normalised:
            weights = _Relative(Linear("weight", context, mix, chosen.ratio, log=True, experts=experts[1:]), experts[0])
        else:
            bounds = chosen.weights if not genome.allow_negative_weights else (-chosen.weights[1], chosen.weights[1])
            weights = Linear("weight", context, mix, bounds, experts=experts)
        density = None
        if genome.merge_method in DENSITY_METHODS:
            density = Linear("density", context, mix, chosen.density, log=True, experts=experts)
        super().__init__(
            context,
            [_method(genome, chosen, context)],
            _Absent(weights, [e for e in context.experts if e not in experts]),
            density,
            advice="a larger layer_granularity or fewer filters make it smaller",
        )
        self._relative = weights if isinstance(weights, _Relative) else None
        self.notes += notes

    def initial_points(self) -> list[Values]:
        """Uniform recipes. Normalised rules have only one of them, so each model in turn also outweighs the others."""
        points = super().initial_points()
        if self._relative is None:
            return points
        emphasised = [
            {**p, **self._relative.emphasis(e, x)} for x in EMPHASES for p in points for e in self._relative.experts
        ]
        out: list[Values] = []
        for point in [*points, *emphasised]:
            if point not in out:
                out.append(point)
        return out[:MOST]


def _method(genome: Genome, chosen: MergekitOptions, context: SpaceContext) -> Method:
    """The method as mergekit defines it.

    Every tensor is trimmed alone, vectors included. Elections are weighted, and dare keeps L1 norms.
    """
    splice = Splice(kind="coefficient" if genome.normalised else "sum")
    settings: dict[str, Any] = {"seed": context.seed, "dtype": context.dtype, "splice": splice}
    uses_density = genome.merge_method in DENSITY_METHODS
    if genome.merge_method == "dare_ties":
        settings |= {"select": {"kind": "bernoulli", "vectors": True}, "rescale": Rescale(kind="match_l1")}
    name = "ties_mergekit" if uses_density else "task_arithmetic"
    template = preset(name, context.models, scale=1.0, **settings)
    template = template.model_copy(update={"preset": f"mergekit {genome.merge_method}", "densities": {}})
    return Method(genome.merge_method, template, uses_density, scaling="fixed")


def _mix(genome: Genome, context: SpaceContext) -> Callable[[Group], Mix]:
    """The function that maps a tensor's group to its layer group, or the two that it lies between, and its filter."""
    depth, n = context.n_blocks, genome.layer_groups(context)
    step = max(1, depth // n)
    positions = [j * (depth - 1) / (n - 1) for j in range(n)] if n > 1 else [0.0]

    def mix(group: Group) -> Mix:
        word = next((f for f in genome.filters if f in group.tensor), "other") if genome.filters else ""
        if n == 1:
            return ((word, 1.0),)
        if genome.smooth:
            layers = curve(positions, depth, group, "layers")
        else:
            at = group.block if group.block is not None else (0 if group.kind == "embedding" else depth - 1)
            layers = ((f"layers.{at // step}", 1.0),)
        return tuple((f"{name}.{word}" if word else name, w) for name, w in layers)

    return mix


class _Relative:
    """Weights relative to that of the first expert, which is 1."""

    def __init__(self, others: Linear, first: str) -> None:
        self._others, self._first = others, first
        self.parameters: Mapping[str, Parameter] = others.parameters
        self.bounds = others.bounds
        self.experts = (first, *others.experts)

    def values(self, point: Point) -> dict[str, float | dict[str, float]]:
        return {self._first: 1.0, **self._others.values(point)}

    def read(self, value: Read) -> Values:
        return self._others.read(value)

    def uniform(self, level: float) -> Values:
        return self._others.uniform(1.0)

    def emphasis(self, expert: str, factor: float) -> Values:
        low, high = self.bounds
        out: Values = {}
        for name, domain in self.parameters.items():
            assert isinstance(domain, Float)
            owner = name.split(".")[1]
            ratio = factor if owner == expert else 1 / factor if expert == self._first else 1.0
            out[name] = min(max(ratio, low), high)
        return out


class _Absent:
    """Experts of the study that the file does not merge have coefficient 0."""

    def __init__(self, axis: Linear | _Relative, absent: Sequence[str]) -> None:
        self._axis, self._absent = axis, absent
        self.parameters, self.bounds = axis.parameters, axis.bounds

    def values(self, point: Point) -> dict[str, float | dict[str, float]]:
        return {**self._axis.values(point), **dict.fromkeys(self._absent, 0.0)}

    def read(self, value: Read) -> Values:
        return self._axis.read(value)

    def uniform(self, level: float) -> Values:
        return self._axis.uniform(level)

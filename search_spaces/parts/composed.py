"""A search space built from methods with options, an axis of coefficients and an axis of densities.

Different points are different merges, with three exceptions that flat spaces cannot avoid. Densities count only if the
method reads them, and options only where their method is chosen (`Composed.active` says which parameters count). An
expert's density does not count where its coefficient is exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge_search.errors import SpaceError
from merge_search.recipe import Recipe
from merge_search.space import Categorical, Float, Integer, Parameter, Point, SearchSpace, SpaceContext
from search_spaces.parts.axes import Axis
from search_spaces.parts.methods import Method

__all__ = ["MAX_DIMENSIONS", "Composed", "check_point", "same_models", "size_notes"]

MAX_DIMENSIONS = 100_000
"""Largest number of parameters that a sampler's own bookkeeping can handle."""
MANY_DIMENSIONS = 200
"""Number of parameters above which a surrogate model learns little from the trials that a study affords."""

LEVELS = (0.7, 1.0, 0.4, 0.55, 0.85, 0.25)
"""Strengths of uniform recipes, the most promising first. Sums over more than three experts take them times 3 / M."""
DENSITIES = (0.2, 0.5)
"""Densities of uniform recipes, in turn."""
UNUSED_DENSITY = 0.5
"""The density in a point whose method reads none."""
FEWEST, MOST = 6, 12
"""Bounds of the number of initial points."""
TOLERANCE = 1e-9
"""Relative difference up to which two numbers of recipes are the same."""

Values = dict[str, str | int | float | bool]


class Composed(SearchSpace):
    """Base class of the families: a method with its options, coefficients and densities.

    Args:
        context: The models of the study.
        methods: The methods to choose from. Two or more make a categorical parameter.
        coefficients: The axis of coefficients.
        density: The axis of densities; None: densities are as published. It is left out if no method reads densities.
        choice: The name of the categorical parameter.
        advice: The way to a smaller space, for the message about its size.

    Attributes:
        parameters: In a fixed order: the method, its options, coefficients, densities.
        notes: Sentences for the user's log.
    """

    def __init__(
        self,
        context: SpaceContext,
        methods: Sequence[Method],
        coefficients: Axis,
        density: Axis | None = None,
        *,
        choice: str = "preset",
        advice: str = "",
    ) -> None:
        self.context = context
        self._methods = {m.name: m for m in methods}
        self._choice = choice
        self._coefficients = coefficients
        self._density = density if any(m.uses_density and not m.fixed_densities for m in methods) else None
        parameters: dict[str, Parameter] = {}
        if len(methods) > 1:
            parameters[choice] = Categorical(tuple(self._methods))
        self._options = {option.name: option for m in methods for option in m.options}
        parameters |= {name: option.domain for name, option in self._options.items()}
        numbers = {**coefficients.parameters, **(self._density.parameters if self._density is not None else {})}
        if taken := parameters.keys() & numbers.keys():
            raise SpaceError(f"space: {', '.join(sorted(taken))} is the name of two parameters; rename the preset")
        parameters |= numbers
        self.parameters: Mapping[str, Parameter] = parameters
        self.notes: list[str] = size_notes(len(parameters), advice)

    def _method(self, point: Point) -> Method:
        name = str(point[self._choice]) if self._choice in self.parameters else next(iter(self._methods))
        return self._methods[name]

    def active(self, point: Point) -> frozenset[str]:
        """Names of the parameters that the merge of `point` depends on: densities and options only if its method reads
        them."""
        names = frozenset(self.parameters) - (self._options.keys() - {o.name for o in self._method(point).options})
        if self._density is not None and not self._method(point).uses_density:
            names -= self._density.parameters.keys()
        return names

    def decode(self, point: Point) -> Recipe:
        """The recipe of a point.

        Raises:
            SpaceError: Every value that is missing or outside its domain.
        """
        check_point(self.parameters, point)
        method = self._method(point).at(point)
        densities = None
        if self._density is not None and method.uses_density:
            densities = self._density.values(point)
        return method.recipe(self._coefficients.values(point), densities)

    def encode(self, recipe: Recipe) -> Values | None:
        """A point that decodes to `recipe`, or None. Numbers are compared up to rounding, whatever their form."""
        if not same_models(self.context, recipe):
            return None
        for choice in self._methods.values():
            options = choice.options_of(recipe)
            if options is None:
                continue
            method = choice.at(options)
            if not method.same_stages(recipe) or method.turns_signs(recipe):
                continue
            point = self._chosen(method.name, options)
            point |= self._coefficients.read(lambda e, g, m=method: m.strength(recipe, e, g))  # type: ignore[misc]
            if self._density is not None:
                point |= (
                    self._density.read(recipe.density) if method.uses_density else self._density.uniform(UNUSED_DENSITY)
                )
            if not problems_of(self.parameters, point) and self._same(method, self.decode(point), recipe):
                return {name: point[name] for name in self.parameters}
        return None

    def _chosen(self, name: str, options: Values) -> Values:
        """The part of a point that chooses a method, with the usual values of all options but these."""
        choice: Values = {self._choice: name} if self._choice in self.parameters else {}
        return choice | {n: option.usual for n, option in self._options.items()} | options

    def _same(self, method: Method, one: Recipe, two: Recipe) -> bool:
        """Whether two recipes of a method have the same numbers for every tensor."""
        for group in self.context.groups:
            for e in self.context.experts:
                if not _close(method.strength(one, e, group), method.strength(two, e, group)):
                    return False
                if method.uses_density and not _close(one.density(e, group), two.density(e, group)):
                    return False
        return method.scaling != "fixed" or one.scale == two.scale

    def initial_points(self) -> list[Values]:
        """Uniform recipes of every method at several strengths, with usual densities: a cheap and good start."""
        points: dict[tuple[tuple[str, object], ...], Values] = {}
        for rank, level in enumerate(self._levels()):
            for i, method in enumerate(self._methods.values()):
                many = 3 / len(self.context.experts)
                strength = level * many if many < 1 and method.is_sum else level
                point = self._chosen(method.name, {o.name: o.usual_at(rank) for o in method.options})
                point |= self._coefficients.uniform(strength)
                if self._density is not None:
                    usual = DENSITIES[(i + rank) % len(DENSITIES)] if method.uses_density else UNUSED_DENSITY
                    point |= self._density.uniform(usual)
                points.setdefault(tuple(point.items()), point)
                if len(points) == MOST:
                    return list(points.values())
        return list(points.values())

    def _levels(self) -> list[float]:
        """Strengths within the bounds, enough for `FEWEST` points."""
        low, high = self._coefficients.bounds
        inside = [x for x in LEVELS if low <= x <= high]
        if len(inside) < len(LEVELS) // 2:
            inside = [low + x * (high - low) for x in LEVELS]
        wanted = max(2, -(-FEWEST // len(self._methods)))
        extra = [low + (high - low) * (k + 0.5) / FEWEST for k in range(FEWEST)]
        return [*inside, *extra][: max(wanted, 3) if len(self._methods) < MOST else 1]


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(1.0, abs(a), abs(b))


def same_models(context: SpaceContext, recipe: Recipe) -> bool:
    """Whether `recipe` merges the context's models as they are and in their order, with its seed and dtype.

    Models are compared by their hashes if both have them, else by their places.
    """
    wanted, given = context.models, recipe.models
    if recipe.transform is not None or (recipe.seed, recipe.dtype) != (context.seed, context.dtype):
        return False
    if list(wanted.experts) != list(given.experts):
        return False
    if wanted.hashes and given.hashes:
        return wanted.hashes == given.hashes
    return (wanted.base, dict(wanted.experts)) == (given.base, dict(given.experts))


def problems_of(parameters: Mapping[str, Parameter], point: Point) -> list[str]:
    """One sentence per value of `point` that is missing or outside its domain."""
    problems = []
    for name, domain in parameters.items():
        if name not in point:
            problems.append(f"point: {name} is missing")
            continue
        value = point[name]
        match domain:
            case Categorical(choices):
                if value not in choices:
                    problems.append(f"point: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
            case Float(low, high) | Integer(low, high):
                if isinstance(value, str) or not low <= value <= high:
                    problems.append(f"point: {name} must lie in [{low:g}, {high:g}], got {value!r}")
    return problems


def check_point(parameters: Mapping[str, Parameter], point: Point) -> None:
    """Raise `SpaceError` with every value of `point` that is missing or outside its domain."""
    problems = problems_of(parameters, point)
    if problems:
        raise SpaceError(problems)


def size_notes(n: int, advice: str = "") -> list[str]:
    """Notes on the number of dimensions.

    Args:
        n: The number of dimensions.
        advice: The way to a smaller space.

    Raises:
        SpaceError: There are no dimensions, or more than a sampler can handle.
    """
    if n == 0:
        raise SpaceError("space: nothing varies: it has 0 dimensions and needs at least 1")
    tail = f"; {advice}" if advice else ""
    if n > MAX_DIMENSIONS:
        raise SpaceError(f"space: it has {n} dimensions, and at most {MAX_DIMENSIONS} can be searched{tail}")
    if n > MANY_DIMENSIONS:
        return [
            f"the space has {n} dimensions; above {MANY_DIMENSIONS} a search learns little from the trials that one "
            f"affords{tail}"
        ]
    return []

"""A family over the models that a transform makes: the key `transform`, which every family has.

    space: {type: blockwise, transform: {stack: {layers: ["0 1 2 3", "0 1 1 2 3"]}}}    a list is searched
    space: {type: compatibility, transform: mal}                                       its defaults
    space: {transform: [none, {stack: {layers: "0 1 1 2"}}, mal]}                       one of these

The value is the name of a transform, a mapping from names to options, or a list of both. Options are written as those
of presets (`parts.option_axes`): one value, a list to choose from, ``{bounds: [low, high]}``. ``none`` merges the
models as they are.

The space has one dimension for the choice of a transform, if there are several, and one for every option that is
searched, besides those of the family. The family has the blocks of the deepest result. Numbers of blocks that a result
does not have do not count, and neither do those of the family where nothing is merged (`Transformed.active`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

from merge_search.errors import SpaceError
from merge_search.recipe import Group, Recipe, Scalar, Transform
from merge_search.rules import TRANSFORMS, option_problems
from merge_search.space import Categorical, Parameter, Point, SearchSpace, SpaceContext
from search_spaces.parts.composed import Values, check_point
from search_spaces.parts.option_axes import holds, option_value, usual_at

__all__ = ["Transformed"]

NONE = "none"
CHOICE = "transform"
MOST_CHECKED = 64
"""Most results of transforms whose headers are checked before the search."""


@dataclass(frozen=True)
class _Choice:
    """A transform with fixed options and searched ones.

    Attributes:
        label: Its value of the categorical parameter.
        name: The transform; '' for none.
        fixed: Options that are not searched.
        searched: Option -> (parameter, domain).
    """

    label: str
    name: str
    fixed: Mapping[str, Scalar]
    searched: Mapping[str, tuple[str, Parameter]]

    def at(self, point: Point) -> Transform | None:
        options = {**self.fixed, **{o: point[parameter] for o, (parameter, _) in self.searched.items()}}
        return None if not self.name else Transform(name=self.name, options=_canonical(self.name, options))

    def usual(self, rank: int) -> Values:
        """Values of its parameters in the initial point of this rank."""
        published = TRANSFORMS[self.name].options if self.name else {}
        return {p: usual_at(domain, published[o], rank) for o, (p, domain) in self.searched.items()}

    def read(self, transform: Transform | None) -> Values | None:
        """Values of its parameters that give a transform; None if none do."""
        if transform is None or transform.name != self.name:
            return {} if transform is None and not self.name else None
        options = TRANSFORMS[self.name].completed(transform.options)
        point: Values = {}
        for option, (parameter, domain) in self.searched.items():
            if not holds(domain, options[option]):
                return None
            point[parameter] = options[option]
        return point if self.at(point) == Transform(name=self.name, options=_canonical(self.name, options)) else None

    def all(self) -> Iterator[Transform | None]:
        """Every transform that it may be; of a range its ends."""
        domains = [d.choices if isinstance(d, Categorical) else (d.low, d.high) for _, d in self.searched.values()]
        for values in product(*domains):
            yield self.at(dict(zip((p for p, _ in self.searched.values()), values, strict=True)))


def _canonical(name: str, options: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Options without those that have their defaults, so that equal merges have equal fingerprints."""
    defaults = TRANSFORMS[name].options
    return {
        o: v for o, v in options.items() if v != defaults[o] or isinstance(v, bool) != isinstance(defaults[o], bool)
    }


def _checked(written: object, context: SpaceContext, build: Callable[[SpaceContext], SearchSpace]) -> Sequence[_Choice]:
    """The choices that `written` says.

    Raises:
        SpaceError: Every problem with them, and those of the family over the models as they are.
    """
    try:
        return _choices(written)
    except SpaceError as error:
        problems = list(error.problems)
    try:
        build(context)
    except SpaceError as error:
        problems += error.problems
    raise SpaceError(problems)


class Transformed(SearchSpace):
    """A family over the models that a transform makes.

    Args:
        written: The value of the key ``transform``.
        context: The models of the study.
        build: Builds the family for the models that are merged.
    """

    def __init__(self, written: object, context: SpaceContext, *, build: Callable[[SpaceContext], SearchSpace]) -> None:
        choices = _checked(written, context, build)
        self._choices = {choice.label: choice for choice in choices}
        self.context = context
        results = list(islice((t for c in choices for t in c.all()), MOST_CHECKED + 1))
        self.transforms: Sequence[Transform | None] = results[:MOST_CHECKED]
        groups = {g.tensor: g for t in self.transforms for g in self._groups(t)}
        self._family = build(replace(context, groups=tuple(groups.values()), transform=None))
        own: dict[str, Parameter] = {CHOICE: Categorical(tuple(self._choices))} if len(choices) > 1 else {}
        own |= {parameter: domain for c in choices for parameter, domain in c.searched.values()}
        if taken := own.keys() & self._family.parameters.keys():
            raise SpaceError(f"space.transform: the family has the parameter {', '.join(sorted(taken))}, too")
        self._own = own
        self.parameters: Mapping[str, Parameter] = {**own, **self._family.parameters}
        self.notes: Sequence[str] = list(self._family.notes)
        if len(results) > MOST_CHECKED:
            self.notes = [
                *self.notes,
                f"space.transform: the first {MOST_CHECKED} results are checked before the search, others in trials",
            ]

    def _groups(self, transform: Transform | None) -> tuple[Group, ...]:
        after = self.context.groups_after
        return self.context.groups if transform is None or after is None else after(transform)

    def _choice(self, point: Point) -> _Choice:
        return self._choices[str(point[CHOICE])] if CHOICE in self._own else next(iter(self._choices.values()))

    def active(self, point: Point) -> frozenset[str]:
        """Names of the parameters that the merge of `point` depends on."""
        choice = self._choice(point)
        own = ({CHOICE} & self._own.keys()) | {p for p, _ in choice.searched.values()}
        if not _merges(choice.at(point)):
            return frozenset(own)
        family = getattr(self._family, "active", lambda point: frozenset(self._family.parameters))
        return frozenset(own) | family(self._inner(point))

    def _inner(self, point: Point) -> Values:
        return {name: point[name] for name in self._family.parameters if name in point}

    def decode(self, point: Point) -> Recipe:
        """The recipe of a point.

        Raises:
            SpaceError: Every value that is missing or outside its domain.
        """
        check_point(self._own, point)
        transform = self._choice(point).at(point)
        if not _merges(transform):
            return self.context.recipe(transform=transform)
        recipe = self._family.decode(self._inner(point))
        return with_transform(recipe, transform, self._groups(transform))

    def encode(self, recipe: Recipe) -> Values | None:
        """A point that decodes to `recipe`, or None."""
        for choice in self._choices.values():
            options = choice.read(recipe.transform)
            if options is None:
                continue
            if not _merges(recipe.transform):
                is_alone = recipe.fingerprint == self.context.recipe(transform=recipe.transform).fingerprint
                family = dict(self._family.initial_points()[0]) if is_alone else None
            else:
                family = self._family.encode(recipe.model_copy(update={"transform": None}))
            if family is None:
                return None
            point = {**self._usual(choice, 0), **options, **family}
            return {name: point[name] for name in self.parameters}
        return None

    def _usual(self, choice: _Choice, rank: int) -> Values:
        """The values of the space's own parameters with this choice."""
        values: Values = {CHOICE: choice.label} if CHOICE in self._own else {}
        for other in self._choices.values():
            values |= other.usual(rank)
        return values

    def initial_points(self) -> list[Values]:
        """The family's initial points, with the transforms and their options in turn."""
        choices, out = list(self._choices.values()), []
        for i, point in enumerate(self._family.initial_points()):
            out.append({**self._usual(choices[i % len(choices)], i // len(choices)), **point})
        return out


def _merges(transform: Transform | None) -> bool:
    """Whether coefficients and the rest of a recipe count beside its transform."""
    return transform is None or TRANSFORMS[transform.name].merges


def with_transform(recipe: Recipe, transform: Transform | None, groups: Sequence[Group]) -> Recipe:
    """A recipe with a transform, and without numbers of groups that its models do not have."""
    known = {key for group in groups for key in Group.keys(group)}

    def kept(values: Any) -> Any:
        return {k: v for k, v in values.items() if k in known} if isinstance(values, Mapping) else values

    update: dict[str, Any] = {"transform": transform, "scale": kept(recipe.scale)}
    for field in ("coefficients", "densities"):
        update[field] = {expert: kept(values) for expert, values in getattr(recipe, field).items()}
    return Recipe.model_validate({**dict(recipe), **update})  # a new recipe names the rule file of its transform


def _choices(written: object) -> list[_Choice]:
    """The transforms that a study file names.

    Raises:
        SpaceError: Every problem with names and options.
    """
    entries = written if isinstance(written, list) else [written]
    named: list[tuple[str, Mapping[str, object]]] = []
    problems: list[str] = []
    for entry in entries:
        pairs = entry.items() if isinstance(entry, Mapping) else [(entry, {})]
        for name, options in pairs:
            if not isinstance(name, str | None) or not isinstance(options or {}, Mapping):
                problems.append(
                    f"space.transform: must be a name or {{NAME: {{option: value}}}}, or a list of these, got {entry!r}"
                )
                continue
            named.append((NONE if name is None else name, options or {}))
    if not named and not problems:
        problems.append("space.transform: names no transform; leave it out")
    out: list[_Choice] = []
    for name, options in named:
        label = _label(name, options, [n for n, _ in named])
        if label in {c.label for c in out}:
            problems.append(f"space.transform: {label} stands twice")
            continue
        out.append(_choice(name, options, label, problems))
    if problems:
        raise SpaceError(problems)
    return out


def _label(name: str, options: Mapping[str, object], names: Sequence[str]) -> str:
    if names.count(name) == 1:
        return name
    return f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})"


def _choice(name: str, options: Mapping[str, object], label: str, problems: list[str]) -> _Choice:
    if name == NONE:
        problems += ["space.transform: none has no options"] if options else []
        return _Choice(label, "", {}, {})
    if problem := TRANSFORMS.unknown(name):
        problems.append(f"space.transform: {problem}")
        return _Choice(label, "", {}, {})
    row, fixed, searched = TRANSFORMS[name], {}, {}
    for option, written in options.items():
        value, wrong = option_value(row, option, written)
        problems += [f"space.transform: {p}" for p in wrong]
        if isinstance(value, Scalar):
            problems += [f"space.transform: {p}" for p in option_problems(row, {option: value})]
            fixed[option] = value
        elif value is not None:
            searched[option] = (f"{CHOICE}.{label}.{option}", value)
    return _Choice(label, name, fixed, searched)

"""The contract of search spaces: a search space says what may vary and decodes a point into a recipe.

Parameters are flat, bounded and identifiable: different points mean different merges, and no value is folded by ``abs``
or clamped. A space imports no torch and knows the models only through `SpaceContext`.

    >>> from merge_search.recipe import Group, Models
    >>> class Strength(SearchSpace):
    ...     def __init__(self, options, context, *, folder=None):
    ...         self.context = context
    ...         self.parameters = {"strength": Float(0.0, options.get("high", 1.0))}
    ...     def decode(self, point):
    ...         return self.context.recipe(coefficients=dict.fromkeys(self.context.experts, point["strength"]))
    ...     def encode(self, recipe):
    ...         return {"strength": recipe.coefficients[self.context.experts[0]]}
    ...     def initial_points(self):
    ...         return [{"strength": 0.5}]
    >>> models = Models(base="base", experts={"maths": "maths", "code": "code"})
    >>> space = Strength({}, SpaceContext(models, (Group("model.layers.0.mlp.weight", 0, "mlp"),)))
    >>> space.decode({"strength": 0.3}).coefficients
    {'maths': 0.3, 'code': 0.3}
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from merge_search.errors import MergeSearchError, SpaceError
from merge_search.recipe import Group, Models, Recipe, Transform

__all__ = ["Categorical", "Float", "Integer", "Parameter", "Point", "SearchSpace", "SpaceContext", "decoded"]


@dataclass(frozen=True, slots=True)
class Float:
    """A real number in [low, high]. With `log` it is searched on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number in [low, high]. With `log` it is searched on a logarithmic scale."""

    low: int
    high: int
    log: bool = False


@dataclass(frozen=True, slots=True)
class Categorical:
    """One of `choices`, which have no order."""

    choices: tuple[str | int | float | bool, ...]


Parameter = Float | Integer | Categorical
Point = Mapping[str, str | int | float | bool]
"""Values by parameter name."""


@dataclass(frozen=True)
class SpaceContext:
    """What a space may know of the models.

    Attributes:
        models: Base and experts, as the recipes will name them.
        groups: One entry per mergeable tensor, in the order of the checkpoint.
        seed: The seed of random masks. It is fixed for the whole study.
        dtype: The dtype of the merged tensors; None: the base's own.
        transform: The transform of recipes that name none; given where not every expert has the base's shapes.
        groups_after: The groups of the models that a transform makes, from headers alone.
        without_factors: Experts that cannot be merged as LoRA pairs, and why.
    """

    models: Models
    groups: tuple[Group, ...]
    seed: int = 0
    dtype: str | None = None
    transform: Transform | None = None
    groups_after: Callable[[Transform], tuple[Group, ...]] | None = field(default=None, compare=False, repr=False)
    without_factors: Mapping[str, str] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self.models.experts)

    @property
    def n_blocks(self) -> int:
        return 1 + max((g.block for g in self.groups if g.block is not None), default=-1)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The module kinds that occur inside blocks, in the order of their first tensors."""
        return tuple(dict.fromkeys(g.kind for g in self.groups if g.block is not None))

    def recipe(self, **settings: object) -> Recipe:
        """A recipe over these models, with their seed and dtype.

        Args:
            settings: Fields of `Recipe`.
        """
        fixed = {"models": self.models, "seed": self.seed, "dtype": self.dtype, "transform": self.transform}
        return Recipe.model_validate({**fixed, **settings})


@runtime_checkable
class SearchSpace(Protocol):
    """What may vary: the contract of a family in ``search_spaces/`` or in a user's own file.

    The class is built as ``Family(options, context, folder=...)``. The constructor raises every problem with the
    options at once, as one `SpaceError`.

    Inherit from this class to get its defaults. A class with the same members that does not inherit is accepted, too:
    `merge_search.catalogue.build_space` adds the defaults.

    Constructor arguments:
        options: The ``space`` entry of the study file without the key ``type``.
        context: The `SpaceContext` of the study.
        folder: The folder of the study file. Relative paths in `options` are relative to it.

    Attributes:
        parameters: Domains by name, in a fixed order. They are the same for every point.
        notes: Sentences for the user's log.
        transforms: The transforms that its recipes may have; None for recipes without one.
    """

    parameters: Mapping[str, Parameter]
    notes: Sequence[str] = ()
    transforms: Sequence[Transform | None] = (None,)

    @abstractmethod
    def decode(self, point: Point) -> Recipe:
        """The recipe of a point that has a value for every parameter."""

    @abstractmethod
    def encode(self, recipe: Recipe) -> dict[str, str | int | float | bool] | None:
        """A point that decodes to `recipe`, or None if the space does not hold it."""

    @abstractmethod
    def initial_points(self) -> list[dict[str, str | int | float | bool]]:
        """Points to try before the sampler has a model of the objective, such as uniform recipes. May be empty."""

    def exact_form(self, recipe: Recipe) -> Recipe | None:
        """The recipe that `recipe` approximates to be cheap; None if it approximates nothing.

        Exact forms of the finalists are scored when the search has ended.
        """
        return None


def decoded(space: SearchSpace, point: Point) -> Recipe:
    """The recipe of a point.

    Raises:
        SpaceError: In place of any exception of a user's own space. It ends the trial and not the study.
    """
    try:
        return space.decode(point)
    except MergeSearchError:
        raise
    except Exception as error:
        raise SpaceError(
            f"space {type(space).__name__} failed to decode a point: {type(error).__name__}: {error}"
        ) from error

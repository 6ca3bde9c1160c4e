"""Words shared by the compute side: what tensors it needs, and what one pass over a tensor looks like.

A recipe becomes, per tensor, a `Pass`: a hashable `Structure` (which rules run), `Numbers` (every scalar they need) and
tensors read element by element. Two passes of one structure differ in numbers only, so that a compiled graph serves
every candidate and every tensor length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from merge_search.errors import RecipeError
from merge_search.recipe import Group, Models, Recipe, Scalar
from merge_search.rules import SELECTIONS

__all__ = [
    "SHORT_RANKS",
    "Given",
    "Numbers",
    "Pass",
    "Source",
    "Statistics",
    "Structure",
    "Tensors",
    "is_vector",
    "output_dtype",
    "statistic_of",
]

SHORT_RANKS = 2**15
"""Given ranks are int16 for rows no longer than this."""

Numbers = dict[str, list[float] | list[int]]
"""Scalars of a pass by name; integers are signed 32-bit."""

Given = dict[str, list[Tensor]]
"""Flat tensors, as long as the weights, that a pass reads beside them."""


class Tensors(Protocol):
    """Base and experts, resident.

    Guaranteed: the tensors of one name have one shape; they are floating, not changed and not moved while an engine lives;
    `groups` is in checkpoint order and names tied tensors once.
    """

    @property
    def models(self) -> Models: ...

    @property
    def device(self) -> torch.device:
        """Where merging runs."""
        ...

    @property
    def groups(self) -> Mapping[str, Group]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's, known without reading or moving it."""
        ...

    def base(self, name: str) -> Tensor: ...

    def expert(self, expert: str, name: str) -> Tensor: ...


@runtime_checkable
class Statistics(Protocol):
    """What a `Tensors` may offer besides: numbers measured on data, and coefficient maps."""

    def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
        """The statistic `kind` of `expert` for tensor `name`, None if it was never measured.

        Shape of the tensor, or broadcastable to it. `kind` "map:<sha256>" is a recipe's coefficient map: shape (rows,).
        """
        ...


def statistic_of(tensors: Tensors, kind: str, expert: str, name: str) -> Tensor:
    """A statistic that must be there.

    Raises:
        RecipeError: it is not.
    """
    found = tensors.statistic(kind, expert, name) if isinstance(tensors, Statistics) else None
    if found is None:
        raise RecipeError(
            f"the statistic {kind!r} of expert {expert!r} is needed for tensor {name!r}, but was never measured; "
            "add a statistics provider for it to the study, or choose a measure that needs no data"
        )
    return found


class Source(NamedTuple):
    """Where the scores of a pass come from.

    kind: ``none`` (ones), ``cheap`` (`measure` is evaluated inside the pass), ``given`` (read from a tensor), ``given log``
    (their logarithms, for softmax), ``number`` (one per expert), ``same`` (mixing scores that are the selection scores).
    """

    kind: str = "none"
    measure: str = ""
    options: tuple[tuple[str, Scalar], ...] = ()


NO_SCORES = Source()


_GIVEN_MASKS = ("rank", "rank_band", "mask")


class Structure(NamedTuple):
    """Which rules one pass runs; everything that would change its code and nothing else.

    select: as `recipe.Select.kind`, or ``rank`` / ``rank_band`` / ``mask`` where ranks or masks are given.
    rescale: ``none``, ``number`` or ``probability``. emit: ``weights`` or the combined ``delta`` (float32).
    """

    experts: int
    winsorise: bool = False
    assess: Source = NO_SCORES
    select: str = "all"
    exclusive: bool = False
    gate: bool = False
    rescale: str = "none"
    resolve: str = "none"
    weighted: bool = False
    tie: str = "plus"
    splice: str = "sum"
    mixing: Source = NO_SCORES
    ties: str = "first"
    boost: bool = False
    rows: bool = False
    emit: str = "weights"
    outside: Source = NO_SCORES
    """The splice from outside, by name and options, in place of `splice`: such a pass runs in chunks."""

    @property
    def needs_index(self) -> bool:
        """Whether masks depend on an element's position."""
        return self.rows or (self.select not in _GIVEN_MASKS and SELECTIONS[self.select].needs_position)


@dataclass(frozen=True)
class Pass:
    """Everything that turns base and experts of one tensor into merged weights.

    experts: The active ones, in the order in which they are added up.
    index: Of the tensor's first element, where a whole model is ranked together.
    bound: No |result| can be larger; infinite where the numbers do not say.
    """

    name: str
    shape: tuple[int, ...]
    structure: Structure
    experts: tuple[str, ...]
    numbers: Numbers
    given: Given = field(default_factory=dict)
    index: int = 0
    bound: float = math.inf


def is_vector(shape: tuple[int, ...] | torch.Size) -> bool:
    """Norm gains and biases: tensors that are not sparsified unless `Select.vectors` says so."""
    return len(shape) <= 1


def output_dtype(recipe: Recipe, base: Tensor) -> torch.dtype:
    """Of the merged tensor: the recipe's, or the base's own."""
    if recipe.dtype is None:
        return base.dtype
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    return dtype

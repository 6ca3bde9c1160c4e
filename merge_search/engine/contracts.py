"""Types that the rooms of the engine share: the tensors that it needs, and one pass over a tensor.

For each tensor a recipe becomes a `Pass`: a hashable `Structure` (the rules that run), `Numbers` (every scalar that
they need) and tensors that are read element by element. Two passes of one structure differ in numbers only. So one
compiled graph serves every candidate and every tensor length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from merge_search.errors import NotMeasuredError
from merge_search.recipe import Group, Models, Recipe, Scalar
from merge_search.rules import SELECTIONS

__all__ = [
    "SHORT_RANKS",
    "Factors",
    "Given",
    "Numbers",
    "Pass",
    "Source",
    "Structure",
    "Tensors",
    "is_vector",
    "output_dtype",
    "statistic_of",
]

SHORT_RANKS = 2**15
"""Given ranks of rows up to this length are int16."""

Numbers = dict[str, list[float] | list[int]]
"""Scalars of a pass by name; integers are signed 32-bit."""

Given = dict[str, list[Tensor]]
"""Flat tensors, as long as the weights, that a pass reads beside the weights."""


class Factors(NamedTuple):
    """A delta of low rank as a LoRA pair: b @ a, or its transpose.

    Attributes:
        b: float32, shape (out, r), the adapter's scale included.
        a: float32, shape (r, in).
        transpose: The tensor is stored (in, out): Conv1D, embeddings.
    """

    b: Tensor
    a: Tensor
    transpose: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    def delta(self) -> Tensor:
        """The product, in the tensor's shape: float32."""
        product = self.b @ self.a
        return product.T if self.transpose else product


class Tensors(ABC):
    """Base and experts, as the engine reads them.

    An implementation gives `models`, `device`, `groups`, `shape`, `base` and `expert`; the other members have defaults.

    Guaranteed: the tensors of one name have one shape. They are floating, and are neither changed nor moved while an
    engine lives. `groups` is in checkpoint order and names tied tensors once.

    Attributes:
        models: Base and experts.
        device: Where merging runs.
        groups: The group of every tensor that is merged.
    """

    models: Models
    device: torch.device
    groups: Mapping[str, Group]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, known without reading or moving it."""

    @abstractmethod
    def base(self, name: str) -> Tensor:
        """The base's tensor."""

    @abstractmethod
    def expert(self, expert: str, name: str) -> Tensor:
        """An expert's tensor: the base's shape, its own dtype."""

    def statistic(self, kind: str, expert: str, name: str) -> Tensor | None:
        """The statistic `kind` of `expert` for tensor `name`; None if it was never measured, as by default.

        Shape of the tensor, or broadcastable to it. `kind` "map:<sha256>" is a recipe's coefficient map: shape (rows,).
        """
        return None

    @property
    def has_statistics(self) -> bool:
        """Whether `statistic` has a source. By default it has none."""
        return False

    def statistic_problem(self, kind: str, expert: str) -> str:
        """Why a statistic cannot be had, '' if no reason is known, as by default. Reads no weights."""
        return ""

    def factors(self, expert: str, name: str) -> Factors | None:
        """The LoRA pair whose product is all that an expert changes of a tensor; None where there is no such pair."""
        return None

    def factors_problem(self, expert: str) -> str:
        """Why an expert's matrices have no `factors`, '' if they have. Reads no weights. By default none has."""
        return "its tensors are given whole"

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix is stored (in, out), as transformers' Conv1D keeps it. By default none is."""
        return False

    def expect(self, names: Sequence[str]) -> None:  # noqa: B027
        """Learn in which order tensors will be asked for; empty: in none. By default nothing is done with it."""

    def look_for_maps(self, folder: Path) -> None:  # noqa: B027
        """Look for coefficient maps in this folder too. By default there are no folders."""


def statistic_of(tensors: Tensors, kind: str, expert: str, name: str) -> Tensor:
    """A statistic that the recipe needs.

    Raises:
        NotMeasuredError: It has no value for the tensor.
        RecipeError: It cannot be measured.
    """
    statistic = tensors.statistic(kind, expert, name)
    if statistic is None:
        raise NotMeasuredError(
            f"the statistic {kind!r} of expert {expert!r} is needed for tensor {name!r}, but was never measured; "
            "add a statistics provider for it to the study, or choose a measure that needs no data"
        )
    return statistic


class Source(NamedTuple):
    """Where the scores of a pass come from.

    Attributes:
        kind: ``none`` (ones), ``cheap`` (`measure` is evaluated inside the pass), ``given`` (read from a tensor),
            ``given log`` (logarithms of scores, for softmax), ``number`` (one per expert), ``same`` (mixing scores that
            are the selection scores).
        measure: Name of the rule that is evaluated.
        options: Its text options.
    """

    kind: str = "none"
    measure: str = ""
    options: tuple[tuple[str, Scalar], ...] = ()


NO_SCORES = Source()


_GIVEN_MASKS = ("rank", "rank_band", "mask")


class Structure(NamedTuple):
    """The rules that one pass runs: everything that would change its code and nothing else.

    Attributes:
        select: As `recipe.Select.kind`, or ``rank`` / ``rank_band`` / ``mask`` where ranks or masks are given.
        rescale: ``none``, ``number`` or ``probability``.
        emit: ``weights``, or the combined ``delta`` (float32).
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

    Attributes:
        name: The tensor.
        shape: The tensor's shape.
        structure: The rules that run.
        experts: The active experts, in the order in which they are added up.
        numbers: Every scalar that the rules need.
        given: Tensors that are read beside base and experts.
        index: Position of the tensor's first element, where a whole model is ranked together.
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
    """Whether a shape is that of norm gains and biases, which are sparsified only with `Select.vectors`."""
    return len(shape) <= 1


def output_dtype(recipe: Recipe, base: Tensor) -> torch.dtype:
    """The dtype of a merged tensor: the recipe's, or the base's own."""
    if recipe.dtype is None:
        return base.dtype
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    return dtype

"""Assessments: measures that give every parameter of every expert a score. One measure a file.

`merge_search.rules.measures` has the table. A row names the measure's function, here the one called ``scores`` of a
module:

    scores(context) -> list[Tensor]     float32, one per expert, shape of the delta or broadcastable to it

The module of a *cheap* measure, which is element-wise in the deltas and so is recomputed inside the pass instead of
stored, may have more:

    reduce(context) -> list[tuple[float, ...]]   what it needs of whole tensors, one tuple per expert; cached
    pool(parts) -> tuple[float, ...]             combines one expert's tuples over tensors (scope ``model``)
    numbers(options, reduced, n_experts, n_active) -> list[float]    its scalars for one candidate: ``context.numbers``
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from merge_search.engine.contracts import statistic_of
from merge_search.engine.methods.outside import outside_scores
from merge_search.errors import RecipeError
from merge_search.recipe import Assess, Group, Scalar
from merge_search.rules import MEASURES, Measure, measure_problems
from merge_search.rules import table as tables

if TYPE_CHECKING:
    from merge_search.engine.contracts import Source

__all__ = ["AssessContext", "MeasureFunctions", "load", "measure_of", "option", "options_problems", "scores_of"]


class AssessContext(NamedTuple):
    """What a measure may read. Experts whose delta is zero everywhere are left out.

    Attributes:
        base: float32, read only; in its stored dtype where the measure does not read weights.
        deltas: float32, one per expert, winsorised if the recipe says so; empty where the measure does not read
        weights. raw: The deltas before winsorising.
        numbers: 0-d float32 tensors that the measure's `numbers` made; empty for a measure without.
        options: The recipe's options, completed by the defaults.
        n_experts: Number of experts of the recipe, those that are left out included.
        experts: Names of those with a delta; empty inside a pass.
        every_expert: Names of all experts of the recipe; empty inside a pass.
        group: The tensor's name, block and module kind; None inside a pass.
        seed: The recipe's seed where the measure's row says that scores depend on it, else 0.
        coefficients: One per expert where the measure's row says that scores depend on them, else empty.
        tensors: The source of tensors and statistics; None inside a pass.
    """

    base: Tensor
    deltas: Sequence[Tensor]
    raw: Sequence[Tensor]
    numbers: Sequence[Tensor]
    options: Mapping[str, Scalar]
    n_experts: int = 0
    experts: tuple[str, ...] = ()
    every_expert: tuple[str, ...] = ()
    group: Group | None = None
    seed: int = 0
    coefficients: tuple[float, ...] = ()
    tensors: Any = None

    def statistic(self, kind: str, expert: str) -> Tensor:
        """A statistic of this tensor that was measured on data: float32, on the device of the base.

        Raises:
            RecipeError: it was never measured.
        """
        assert self.group is not None
        return statistic_of(self.tensors, kind, expert, self.group.tensor).to(self.base.device, torch.float32)


def measure_of(assess: Assess) -> Measure:
    """The table's row of a measure.

    Raises:
        RecipeError: the name or an option is unknown, with every problem.
    """
    if assess.options or assess.measure not in MEASURES:
        problems = options_problems(assess)
        if problems:
            raise RecipeError(problems)
    return MEASURES[assess.measure]


def options_problems(assess: Assess) -> list[str]:
    """What is wrong with a measure's name and options; empty if nothing is."""
    return measure_problems(assess.measure, assess.options)


def option(context: AssessContext, name: str) -> float:
    """A numeric option."""
    return float(context.options[name])


class MeasureFunctions(NamedTuple):
    """The functions of a measure, as the head of this file says; None for those that it does not have."""

    scores: Callable[[AssessContext], list[Tensor]]
    reduce: Callable[[AssessContext], list[tuple[float, ...]]] | None = None
    pool: Callable[[Sequence[tuple[float, ...]]], tuple[float, ...]] | None = None
    numbers: Callable[..., list[float]] | None = None


_LOADED: dict[str, tuple[Measure, MeasureFunctions]] = {}
_SCORES: dict[str, Callable[[AssessContext], list[Tensor]]] = {}


def load(name: str) -> MeasureFunctions:
    """The functions of a measure, imported on first use."""
    row = MEASURES[name]
    if name not in _LOADED or _LOADED[name][0] is not row:  # another rule file may define the name anew
        functions = _functions(row)
        _LOADED[name], _SCORES[name] = (row, functions), functions.scores
    return _LOADED[name][1]


def _functions(row: Measure) -> MeasureFunctions:
    if row.is_outside:
        return MeasureFunctions(partial(outside_scores, row))
    scores = tables.load(row)
    module = vars(sys.modules[scores.__module__])
    return MeasureFunctions(scores, module.get("reduce"), module.get("pool"), module.get("numbers"))


def scores_of(
    source: Source, base: Tensor, deltas: Sequence[Tensor], raw: Sequence[Tensor], numbers: Sequence[Tensor]
) -> list[Tensor]:
    """Scores of a cheap measure inside a pass."""
    return _SCORES[source.measure](AssessContext(base, deltas, raw, numbers, dict(source.options)))

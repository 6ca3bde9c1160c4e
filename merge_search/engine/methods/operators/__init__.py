"""Tensor operators and post rules: what they are given, and what they guarantee. `merge_search.rules` lists them.

An operator is ``operator(context: OperatorContext) -> Tensor | list[Tensor]``:

- a `Tensor`: the merged weights (float32), coefficients and scale included; post rules apply to their difference from
  the base;
- a list, one processed delta per expert of the context: weights are theta_0 + scale * post(sum_i lambda_i delta_i).

A post rule is ``post(context: OperatorContext, delta: Tensor) -> Tensor``; the scale comes after it.

Every operator keeps these promises. It does not change its inputs and draws no random numbers. The order of the experts
changes only the rounding of sums. Where all deltas are zero, the result is the base bit for bit. An operator that
returns a list reads neither coefficients nor scale, so that coefficients per group, learners and slopes apply to its
parts; a costly one keeps its parts in `OperatorContext.cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from merge_search.engine.methods.outside import outside_operator, outside_post
from merge_search.errors import RecipeError
from merge_search.memory import BudgetedCache
from merge_search.recipe import Group, Operator, Scalar
from merge_search.rules import OPERATORS, POSTS, OperatorInfo, RuleTable
from merge_search.rules import operator_problems as _problems
from merge_search.rules import table as tables

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OPERATORS", "POSTS", "OperatorContext", "OperatorInfo", "load_operator", "operator_problems"]


@dataclass(frozen=True)
class OperatorContext:
    """What an operator may read.

    Attributes:
        name: Name of the tensor.
        group: Its block and module kind.
        base: float32.
        deltas: float32, one per expert in the recipe's order; zero deltas included.
        experts: Names of the experts.
        active: Which deltas are not zero.
        coefficients: lambda_i of this tensor.
        options: The recipe's options, completed by the defaults.
        scale: lambda_out of this tensor, for an operator that returns weights.
        transposed: Whether the tensor is stored (in, out), as in GPT-2's Conv1D.
        stored: Expert -> its tensor as stored; None where only deltas are known.
        statistic: (kind, expert) -> a statistic measured on data; raises `RecipeError` where there is none.
        siblings: () -> deltas of every tensor of the same block, one tuple per tensor; None where the engine has none.
        seed: Seed of the recipe.
        memory: Small results that do not depend on the candidate, by a key that names the operator, the tensor, the
            experts and the options. It lives as long as the engine.
        cache: Processed deltas that do not depend on the candidate (`remember.remembered`); None: nothing is kept.
    """

    name: str
    group: Group
    base: Tensor
    deltas: tuple[Tensor, ...]
    experts: tuple[str, ...]
    active: tuple[bool, ...]
    coefficients: tuple[float, ...]
    options: Mapping[str, Scalar]
    scale: float = 1.0
    transposed: bool = False
    stored: Callable[[str], Tensor] | None = None
    statistic: Callable[[str, str], Tensor] | None = None
    siblings: Callable[[], Iterable[tuple[Tensor, ...]]] | None = None
    seed: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)
    cache: BudgetedCache[tuple[Any, list[Tensor]]] | None = None

    def number(self, option: str) -> float:
        """A numeric option."""
        return float(self.options[option])

    def where(self) -> str:
        """The tensor, for messages."""
        return f"tensor {self.name!r}"


def load_operator(info: OperatorInfo) -> Callable[..., Any]:
    """The function of a row."""
    if info.is_outside:
        return partial(outside_post if POSTS.get(info.name) is info else outside_operator, info)
    return tables.load(info)


def operator_problems(operator: Operator, table: RuleTable[OperatorInfo], kind: str, n_experts: int) -> list[str]:
    """What is wrong with an operator's or post rule's name, options and number of experts."""
    return _problems(operator.name, operator.options, n_experts, table=table)


def completed_options(operator: Operator, info: OperatorInfo) -> dict[str, Scalar]:
    """The recipe's options over the table's defaults."""
    return info.completed(operator.options)


def require_known(operator: Operator, table: RuleTable[OperatorInfo], kind: str, n_experts: int) -> OperatorInfo:
    """The table's row.

    Raises:
        RecipeError: with everything that is wrong.
    """
    problems = operator_problems(operator, table, kind, n_experts)
    if problems:
        raise RecipeError(problems)
    return table[operator.name]

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

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from merge_search.engine.contracts import Factors
from merge_search.engine.methods.contexts import OperatorContext
from merge_search.engine.methods.outside import outside_operator, outside_post
from merge_search.errors import RecipeError
from merge_search.recipe import Operator, Scalar
from merge_search.rules import OPERATORS, POSTS, OperatorInfo, RuleTable
from merge_search.rules import operator_problems as _problems
from merge_search.rules import table as tables

__all__ = ["OPERATORS", "POSTS", "OperatorContext", "OperatorInfo", "load_operator", "load_pairs", "operator_problems"]


def load_operator(info: OperatorInfo) -> Callable[..., Any]:
    """The function of a row."""
    if info.is_outside:
        return partial(outside_post if POSTS.get(info.name) is info else outside_operator, info)
    return tables.load(info)


def load_pairs(info: OperatorInfo) -> Callable[[OperatorContext], list[Factors | None] | None]:
    """The function of a row that gives its parts as LoRA pairs; a row without has none."""
    return tables.load(replace(info, target=info.pairs))


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

"""Tensor operators and post rules by name. This file lists them without importing torch.

An operator is ``operator(context: OperatorContext) -> Tensor | list[Tensor]``:

- a `Tensor`: the merged weights (float32), coefficients and scale included; post rules apply to what they add to the base;
- a list, one processed delta per expert of the context: weights are theta_0 + scale * post(sum_i lambda_i delta_i).

A post rule is ``post(context: OperatorContext, delta: Tensor) -> Tensor``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge_search.errors import RecipeError, nearest
from merge_search.recipe import Group, Operator, Scalar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OPERATORS", "POSTS", "OperatorContext", "OperatorInfo", "load_operator", "operator_problems"]


@dataclass(frozen=True)
class OperatorInfo:
    """One entry of `OPERATORS` or `POSTS`.

    Attributes:
        target: "module:function".
        summary: One line.
        ndim: Numbers of axes it handles, () for all; other tensors get the mean of lambda_i delta_i (a post rule: no change).
        experts: Smallest and largest number of experts; None for no bound.
        options: Names and defaults; None: no default.
        exact: It must run even where no expert changed the tensor.
    """

    target: str
    summary: str
    ndim: tuple[int, ...] = ()
    experts: tuple[int, int | None] = (1, None)
    options: Mapping[str, Scalar | None] = field(default_factory=dict)
    exact: bool = False


@dataclass(frozen=True)
class OperatorContext:
    """What an operator may read.

    Attributes:
        name, group: The tensor.
        base: float32.
        deltas: float32, one per expert in the recipe's order; zero deltas included.
        experts: Their names. active: which deltas are not zero.
        coefficients: lambda_i of this tensor.
        options: The recipe's, completed by the defaults.
        scale: lambda_out of this tensor; of use where an operator returns weights.
        transposed: The tensor is stored (in, out), as in GPT-2's Conv1D.
        stored: Expert -> its tensor as it is stored, None where only deltas are known.
        statistic: (kind, expert) -> a statistic measured on data; raises `RecipeError` where there is none.
        siblings: () -> deltas of every tensor of the same block, one tuple per tensor, where the engine can give them.
        seed: Of the recipe.
        memory: Lives as long as the engine: results that do not depend on the candidate (SVDs), by a key that names the
            operator, the tensor, the experts and the options it depends on.
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

    def number(self, option: str) -> float:
        """A numeric option."""
        return float(self.options[option])

    def where(self) -> str:
        """The tensor, for messages."""
        return f"tensor {self.name!r}"


OPERATORS: dict[str, OperatorInfo] = {
    "passthrough": OperatorInfo(
        "merge_search.engine.operators.passthrough:merge",
        "the base, or one expert, bit for bit",
        options={"expert": ""},
        exact=True,
    ),
}

POSTS: dict[str, OperatorInfo] = {}


def load_operator(info: OperatorInfo) -> Callable[..., Any]:
    """The function an entry names."""
    module, _, function = info.target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def operator_problems(operator: Operator, table: Mapping[str, OperatorInfo], kind: str, n_experts: int) -> list[str]:
    """What is wrong with an operator's name, options and number of experts."""
    info = table.get(operator.name)
    if info is None:
        return [f"{kind}: unknown {kind} {operator.name!r}{nearest(operator.name, table)}"]
    problems = [
        f"{kind}: {operator.name!r} has no option {o!r}{nearest(o, info.options)}"
        for o in operator.options
        if o not in info.options
    ]
    low, high = info.experts
    if n_experts < low or (high is not None and n_experts > high):
        bounds = f"at least {low}" if high is None else (f"exactly {low}" if low == high else f"{low} to {high}")
        problems.append(f"{kind}: {operator.name!r} takes {bounds} experts, the recipe has {n_experts}")
    return problems


def completed_options(operator: Operator, info: OperatorInfo) -> dict[str, Scalar]:
    """The recipe's options over the table's defaults."""
    return {**{k: v for k, v in info.options.items() if v is not None}, **operator.options}


def require_known(operator: Operator, table: Mapping[str, OperatorInfo], kind: str, n_experts: int) -> OperatorInfo:
    """The table's entry.

    Raises:
        RecipeError: with everything that is wrong.
    """
    problems = operator_problems(operator, table, kind, n_experts)
    if problems:
        raise RecipeError(problems)
    return table[operator.name]

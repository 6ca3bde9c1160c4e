"""Tensor operators and post rules by name. This file lists them without importing torch.

An operator is ``operator(context: OperatorContext) -> Tensor | list[Tensor]``:

- a `Tensor`: the merged weights (float32), coefficients and scale included; post rules apply to what they add to the base;
- a list, one processed delta per expert of the context: weights are theta_0 + scale * post(sum_i lambda_i delta_i).

A post rule is ``post(context: OperatorContext, delta: Tensor) -> Tensor``; the scale comes after it.

Guaranteed by all: inputs are not changed, no random numbers are drawn, the order of the experts changes only the rounding of
sums, zero deltas of all experts give the base bit for bit. Operators that return a list see neither coefficients nor scale,
so that coefficients per group, learners and slopes apply to what they return; the costly ones keep it in
`OperatorContext.memory`.
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
        paper: Where it was published.
        decomposing: It returns one processed delta per expert.
        choices: Allowed values of text options.
        scales: Values of the recipe's scale that are usually tried, the published one first.
        statistics: Kinds of statistics it needs from data.
    """

    target: str
    summary: str
    ndim: tuple[int, ...] = ()
    experts: tuple[int, int | None] = (1, None)
    options: Mapping[str, Scalar | None] = field(default_factory=dict)
    exact: bool = False
    paper: str = ""
    decomposing: bool = False
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scales: tuple[float, ...] = (1.0,)
    statistics: tuple[str, ...] = ()


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


_HERE = "merge_search.engine.methods.operators"
_MATRICES = (2, 3)  # a 3-D tensor is a stack of matrices: fused experts
_SCALES = (1.0, 0.2, 0.4, 0.6, 0.8, 1.2, 1.5, 2.0, 2.5, 3.0)
"""Spread over the (0, 3] on which the authors of TSV-M and Iso choose theirs."""
_MERGEKIT = "mergekit, Goddard et al. 2024, arXiv 2403.13257"
_SPACE = {"space": ("weights", "delta")}


def _entry(module: str, function: str, summary: str, paper: str, **rest: Any) -> OperatorInfo:
    return OperatorInfo(f"{_HERE}.{module}:{function}", summary, paper=paper, decomposing=function == "parts", **rest)


OPERATORS: dict[str, OperatorInfo] = {
    "passthrough": _entry(
        "passthrough", "merge", "the base, or one expert, bit for bit", _MERGEKIT, options={"expert": ""}, exact=True
    ),
    "slerp": _entry(
        "slerp", "merge", "along the great circle between base and expert, or between two experts", f"Shoemake 1985; {_MERGEKIT}",
        options={"t": None, "space": "weights"}, choices=_SPACE, experts=(1, 2),
    ),
    "nuslerp": _entry(
        "nuslerp", "merge", "great circle between base and expert, or two experts, by tensor, row or column", _MERGEKIT,
        options={"axis": "tensor", "space": "delta"}, choices={"axis": ("tensor", "row", "column"), **_SPACE}, experts=(1, 2),
    ),
    "multislerp": _entry(
        "multislerp", "merge", "mean direction of all experts times their mean norm", _MERGEKIT,
        options={"space": "delta", "base_weight": 0.0}, choices=_SPACE,
    ),
    "karcher": _entry(
        "karcher", "merge", "Karcher mean of the experts' directions times their mean norm", f"Karcher 1977; {_MERGEKIT}",
        options={"space": "weights", "steps": 10, "tolerance": 1e-5, "base_weight": 0.0}, choices=_SPACE,
    ),
    "model_stock": _entry(
        "model_stock", "parts", "average, shrunk towards the base by the angle between the deltas", "Model Stock, Jang et al. 2024, arXiv 2403.19522",
        options={"scope": "tensor", "clamp": True, "count": "changed"}, scales=(1.0, 0.5, 0.75, 1.5, 2.0),
        choices={"scope": ("tensor", "layer", "row"), "count": ("changed", "all")},
    ),
    "nearswap": _entry(
        "nearswap", "parts", "the expert's value where it is close to the base's", _MERGEKIT, options={"t": 1e-3}
    ),
    "arcee_fusion": _entry(
        "arcee_fusion", "parts", "only changes with outstanding |delta| x KL of their row", _MERGEKIT, options={"multiple": 1.5}
    ),
    "regmean": _entry(
        "regmean", "parts", "least-squares match of every linear layer's outputs", "RegMean, Jin et al. 2022, arXiv 2212.09849",
        ndim=_MATRICES, options={"alpha": 0.95, "ridge": 1e-6}, statistics=("gram",),
    ),
    "tsv_m": _entry(
        "tsv_m", "parts", "low-rank deltas with directions made orthogonal between experts", "TSV-Merge, Gargiulo et al. 2024, arXiv 2412.00081",
        ndim=_MATRICES, options={"rank_share": 1.0, "embeddings": True}, scales=_SCALES,
    ),
    "iso_c": _entry(
        "iso_c", "parts", "summed delta with a flat spectrum", "Iso-C, Marczak et al. 2025, arXiv 2502.04959",
        ndim=_MATRICES, options={"power": 0.0, "tolerance": 1e-5, "embeddings": True}, scales=_SCALES,
    ),
    "iso_cts": _entry(
        "iso_cts", "parts", "flat spectrum over common and task-specific directions", "Iso-CTS, Marczak et al. 2025, arXiv 2502.04959",
        ndim=_MATRICES, options={"common": 0.8, "tolerance": 1e-5, "embeddings": True}, scales=_SCALES,
    ),
    "wudi": _entry(
        "wudi", "parts", "least interference with every expert's delta, taken as its own data", "WUDI-Merging, Cheng et al. 2025, arXiv 2503.08099",
        ndim=_MATRICES,
        options={"solver": "adam", "steps": 300, "lr": 1e-5, "relative_lr": False, "ridge": 0.1, "norm": "squared", "embeddings": True},
        choices={"solver": ("adam", "closed"), "norm": ("squared", "plain")},
    ),
}  # fmt: skip
"""Operators by the name that recipes use."""

POSTS: dict[str, OperatorInfo] = {
    "svc": _entry(
        "svc", "post", "shrinks singular directions that several experts share", "SVC, arXiv 2602.05536",
        ndim=_MATRICES, options={"alpha": 0.1, "cap": None},
    ),
    "iso_spectrum": _entry(
        "iso_spectrum", "post", "flattens the spectrum: S becomes S**power at the same sum", "after Iso-C, arXiv 2502.04959",
        ndim=_MATRICES, options={"power": 0.0, "tolerance": 1e-5}, scales=_SCALES,
    ),
    "norm_match": _entry("norm_match", "post", "as long as the experts' deltas are on average", "-"),
}  # fmt: skip
"""Rules on the combined delta by the name that recipes use."""


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
        problem for o, value in operator.options.items() if (problem := _option_problem(operator.name, info, o, value))
    ]
    problems = [f"{kind}: {problem}" for problem in problems]
    low, high = info.experts
    if n_experts < low or (high is not None and n_experts > high):
        bounds = f"at least {low}" if high is None else (f"exactly {low}" if low == high else f"{low} to {high}")
        problems.append(f"{kind}: {operator.name!r} takes {bounds} experts, the recipe has {n_experts}")
    return problems


def _option_problem(name: str, info: OperatorInfo, option: str, value: Scalar) -> str:
    """What is wrong with one option; '' if nothing is. An option without default takes a number."""
    if option not in info.options:
        return f"{name!r} has no option {option!r}{nearest(option, info.options)}"
    default = info.options[option]
    choices = info.choices.get(option)
    if choices is not None and value not in choices:
        return f"option {option!r} of {name!r} must be one of {', '.join(choices)}, got {value!r}"
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, str):
        fits, wanted = isinstance(value, str), "text"
    else:
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    return "" if fits else f"option {option!r} of {name!r} must be {wanted}, got {value!r}"


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

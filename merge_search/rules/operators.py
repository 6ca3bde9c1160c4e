"""Operators (rules on whole tensors in place of the stages) and post rules (on the combined delta). torch-free.

`engine.methods.operators` has the formulas and says what they guarantee.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_search.rules.option_table import OPERATOR_OPTIONS, POST_OPTIONS
from merge_search.rules.table import Rule, RuleTable, Scalar, option_problems

__all__ = ["OPERATORS", "POSTS", "OperatorInfo", "operator_problems", "pairs_refusal"]


@dataclass(frozen=True, kw_only=True)
class OperatorInfo(Rule):
    """One row of `OPERATORS` or `POSTS`.

    Attributes:
        ndim: Numbers of axes it handles, () for all; other tensors get the mean of lambda_i delta_i (a post rule: no
        change). experts: Smallest and largest number of experts; None for no bound.
        exact: It must run even where no expert changed the tensor.
        paper: Where it was published.
        decomposing: It returns one processed delta per expert.
        scales: Values of the recipe's scale that are usually tried, the published one first.
        statistics: Kinds of statistics it needs from data; ``{option}`` stands for the value of an option.
        needs_factors: It reads LoRA pairs, so every expert must be an adapter.
        uses_density: Densities decide.
        pairs: "module:function" that gives the processed deltas as LoRA pairs, so that the merge is an adapter.
    """

    ndim: tuple[int, ...] = ()
    experts: tuple[int, int | None] = (1, None)
    exact: bool = False
    paper: str = ""
    decomposing: bool = False
    scales: tuple[float, ...] = (1.0,)
    statistics: tuple[str, ...] = ()
    needs_factors: bool = False
    uses_density: bool = False
    pairs: str = ""

    def statistics_asked(self, options: Mapping[str, Scalar]) -> tuple[str, ...]:
        """Kinds of statistics that it reads under these options of a recipe."""
        completed = self.completed(options)
        if self.is_outside:  # its function gets them like this, and asks by their text
            completed = self.typed(completed)
        return tuple(kind.format_map(completed) for kind in self.statistics)


_HERE = "merge_search.engine.methods.operators"
_MATRICES = (2, 3)  # a 3-D tensor is a stack of matrices: fused experts
_SCALES = (1.0, 0.2, 0.4, 0.6, 0.8, 1.2, 1.5, 2.0, 2.5, 3.0)
"""Spread over the (0, 3] on which the authors of TSV-M and Iso choose theirs."""
_MERGEKIT = "mergekit, Goddard et al. 2024, arXiv 2403.13257"
_SPACE = {"space": ("weights", "delta")}


def _entry(name: str, function: str, summary: str, paper: str, **rest: Any) -> OperatorInfo:
    target, decomposing = f"{_HERE}.{name}:{function}", function == "parts"
    about = (POST_OPTIONS if function == "post" else OPERATOR_OPTIONS).get(name, {})
    return OperatorInfo(
        name=name, summary=summary, target=target, paper=paper, about=about, decomposing=decomposing, **rest
    )


OPERATORS: RuleTable[OperatorInfo] = RuleTable("operator", (
    _entry(
        "passthrough", "merge", "the base, or one expert, bit for bit", _MERGEKIT, options={"expert": ""}, exact=True
    ),
    _entry(
        "slerp", "merge", "along the great circle between base and expert, or between two experts",
        f"Shoemake 1985; {_MERGEKIT}",
        options={"t": None, "space": "weights"}, choices=_SPACE, experts=(1, 2),
    ),
    _entry(
        "nuslerp", "merge", "great circle between base and expert, or two experts, by tensor, row or column", _MERGEKIT,
        options={"axis": "tensor", "space": "delta"},
        choices={"axis": ("tensor", "row", "column"), **_SPACE}, experts=(1, 2),
    ),
    _entry(
        "multislerp", "merge", "mean direction of all experts times their mean norm", _MERGEKIT,
        options={"space": "delta", "base_weight": 0.0}, choices=_SPACE,
    ),
    _entry(
        "karcher", "merge", "Karcher mean of the experts' directions times their mean norm",
        f"Karcher 1977; {_MERGEKIT}",
        options={"space": "weights", "steps": 10, "tolerance": 1e-5, "base_weight": 0.0}, choices=_SPACE,
    ),
    _entry(
        "model_stock", "parts", "average, shrunk towards the base by the angle between the deltas",
        "Model Stock, Jang et al. 2024, arXiv 2403.19522",
        options={"scope": "tensor", "clamp": True, "count": "changed"}, scales=(1.0, 0.5, 0.75, 1.5, 2.0),
        choices={"scope": ("tensor", "layer", "row"), "count": ("changed", "all")},
    ),
    _entry("nearswap", "parts", "the expert's value where it is close to the base's", _MERGEKIT, options={"t": 1e-3}),
    _entry(
        "arcee_fusion", "parts", "only changes with outstanding |delta| x KL of their row", _MERGEKIT,
        options={"multiple": 1.5},
    ),
    _entry(
        "regmean", "parts", "least-squares match of every linear layer's outputs",
        "RegMean, Jin et al. 2022, arXiv 2212.09849",
        ndim=_MATRICES, options={"alpha": 0.95, "ridge": 1e-6}, statistics=("gram",),
    ),
    _entry(
        "regmean_parts", "parts", "least-squares match of layer outputs on few prompts, experts weighted by effect",
        "after RegMean, Jin et al. 2022, arXiv 2212.09849",
        options={"weights": "outputs", "ridge": 0.1, "gain": 0.0, "prompts": 64},
        choices={"weights": ("outputs", "inputs", "equal")},
        statistics=("prompt_gram@prompts={prompts}",),
    ),
    _entry(
        "tsv_m", "parts", "low-rank deltas with directions made orthogonal between experts",
        "TSV-Merge, Gargiulo et al. 2024, arXiv 2412.00081",
        ndim=_MATRICES, options={"rank_share": 1.0, "embeddings": True}, scales=_SCALES,
    ),
    _entry(
        "iso_c", "parts", "summed delta with a flat spectrum", "Iso-C, Marczak et al. 2025, arXiv 2502.04959",
        ndim=_MATRICES, options={"power": 0.0, "tolerance": 1e-5, "embeddings": True}, scales=_SCALES,
    ),
    _entry(
        "iso_cts", "parts", "flat spectrum over common and task-specific directions",
        "Iso-CTS, Marczak et al. 2025, arXiv 2502.04959",
        ndim=_MATRICES, options={"common": 0.8, "tolerance": 1e-5, "embeddings": True}, scales=_SCALES,
    ),
    _entry(
        "wudi", "parts", "least interference with every expert's delta, taken as its own data",
        "WUDI-Merging, Cheng et al. 2025, arXiv 2503.08099",
        ndim=_MATRICES,
        options={
            "solver": "adam", "steps": 300, "lr": 1e-5, "relative_lr": False, "ridge": 0.1, "norm": "squared",
            "embeddings": True,
        },
        choices={"solver": ("adam", "closed"), "norm": ("squared", "plain")},
    ),
    _entry(
        "copa", "parts", "LoRA pairs pruned, rescaled and balanced between experts, then multiplied as sums",
        "RobustMerge (CoPA-Merging), Zeng et al. 2025, arXiv 2502.17159",
        ndim=(2,), needs_factors=True, uses_density=True, pairs=f"{_HERE}.copa:pairs",
        options={
            "strength": 2.0, "prune": "both", "rescale": True, "clip": 0.0, "normalise": True, "cross": True,
            "gauge": "stored",
        },
        choices={"prune": ("both", "a", "b"), "gauge": ("stored", "balanced", "svd")},
    ),
    _entry(
        "core", "parts", "a spectral operator on the small cores of LoRA pairs", "Core Space, 2025, arXiv 2509.17786",
        ndim=(2,), scales=_SCALES, needs_factors=True, pairs=f"{_HERE}.core:pairs",
        options={"rule": "tsv_m", "rank_share": 1.0, "power": 0.0, "common": 0.8},
        choices={"rule": ("tsv_m", "iso_c", "iso_cts")},
    ),
))  # fmt: skip
"""Operators by the name that recipes use."""

POSTS: RuleTable[OperatorInfo] = RuleTable("post", (
    _entry(
        "svc", "post", "shrinks singular directions that several experts share", "SVC, arXiv 2602.05536",
        ndim=_MATRICES, options={"alpha": 0.1, "cap": None},
    ),
    _entry(
        "iso_spectrum", "post", "flattens the spectrum: S becomes S**power at the same sum",
        "after Iso-C, arXiv 2502.04959",
        ndim=_MATRICES, options={"power": 0.0, "tolerance": 1e-5}, scales=_SCALES,
    ),
    _entry("norm_match", "post", "as long as the experts' deltas are on average", "-"),
))  # fmt: skip
"""Rules on the combined delta by the name that recipes use."""


def operator_problems(
    name: str, options: Mapping[str, Scalar], n_experts: int, *, table: RuleTable[OperatorInfo]
) -> list[str]:
    """What is wrong with an operator's or post rule's name, options and number of experts."""
    kind = "post" if table is POSTS else "operator"
    if problem := table.unknown(name):
        return [f"{kind}: {problem}"]
    problems = [f"{kind}: {problem}" for problem in option_problems(table[name], options)]
    low, high = table[name].experts
    if n_experts < low or (high is not None and n_experts > high):
        bounds = f"at least {low}" if high is None else (f"exactly {low}" if low == high else f"{low} to {high}")
        problems.append(f"{kind}: {name!r} takes {bounds} experts, the recipe has {n_experts}")
    return problems


def pairs_refusal(who: str, expert: str, why: str) -> str:
    """The problem of a method for LoRA adapters with an expert that has no pairs, with what to do."""
    return (
        f"{who} merges LoRA adapters as pairs, but expert {expert!r} has none: {why}; give the adapter that it was "
        "merged from, or take a method for whole models (task_arithmetic, ties, tsv_m)"
    )

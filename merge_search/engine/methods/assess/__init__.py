"""Assessments: measures that give every parameter of every expert a score. One measure a file.

A measure is a module with

    scores(context) -> list[Tensor]     float32, one per expert, shape of the delta or broadcastable to it

and, if it is *cheap* (element-wise in the deltas, so recomputed inside the pass instead of stored),

    reduce(context) -> list[tuple[float, ...]]   optional: what it needs of whole tensors, one tuple per expert; cached
    pool(parts) -> tuple[float, ...]             optional: combines one expert's tuples over tensors (scope ``model``)
    numbers(options, reduced, n_experts, n_active) -> list[float]    its scalars for one candidate: ``context.numbers``

This file lists measures without importing torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_search.errors import RecipeError, nearest
from merge_search.recipe import Assess, Group, Scalar

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.contracts import Source

__all__ = ["MEASURES", "AssessContext", "Measure", "load", "measure_of", "option", "options_problems", "scores_of"]


@dataclass(frozen=True)
class Measure:
    """One entry of `MEASURES`.

    Attributes:
        target: "module:function" of its `scores`.
        summary: One line.
        needs_data: It reads statistics that a provider must have measured.
        shared: All experts have the same scores.
        cheap: Element-wise; recomputed inside the pass.
        dear: Cheap in that sense, but costlier to make than to read: kept, where there is room, once asked for twice.
        reads_weights: Its `scores` read more of base and deltas than the base's shape and device.
        after_mask: Its scores are made from the surviving deltas (mixing scores only).
        added: The option that is added to every score: passes do that themselves, so that scores need no copy for it.
        bounded: Scores are finite and not negative, so that score-weighted means stay between the deltas.
        ordered: The order of the experts in the recipe matters.
        options: Names and defaults; None: no default.
        reduce_options: Those that `reduce` depends on.
    """

    target: str
    summary: str
    needs_data: bool = False
    shared: bool = False
    cheap: bool = False
    dear: bool = False
    reads_weights: bool = True
    after_mask: bool = False
    ordered: bool = False
    bounded: bool = False
    added: str = ""
    options: Mapping[str, Scalar | None] = None  # type: ignore[assignment]
    reduce_options: tuple[str, ...] = ()


class AssessContext(NamedTuple):
    """What a measure may read. Scores of absent (zero-delta) experts are not asked for.

    Attributes:
        base: float32, read only; as it is stored where the measure does not read weights.
        deltas: float32, winsorised if the recipe says so; raw: as they are. One per expert; none where the measure does
            not read weights.
        numbers: 0-d float32 tensors from `numbers`, empty for measures without.
        options: The recipe's, completed by the defaults.
        experts, group, seed, tensors, coefficients: Of the whole tensor; absent (None) inside a pass.
        n_experts: Of the recipe, inactive ones included.
    """

    base: Tensor
    deltas: Sequence[Tensor]
    raw: Sequence[Tensor]
    numbers: Sequence[Tensor]
    options: Mapping[str, Scalar]
    n_experts: int = 0
    experts: tuple[str, ...] = ()
    group: Group | None = None
    seed: int = 0
    coefficients: tuple[float, ...] = ()
    tensors: Any = None


_HERE = "merge_search.engine.methods.assess"


def _m(module: str, summary: str, *, options: Mapping[str, Scalar | None] | None = None, **flags: Any) -> Measure:
    return Measure(f"{_HERE}.{module}:scores", summary, options=options or {}, **flags)


MEASURES: dict[str, Measure] = {
    "ones": _m("ones", "every parameter alike", shared=True, cheap=True, bounded=True),
    "magnitude": _m("magnitude", "|delta|", cheap=True, bounded=True),
    "rank": _m("rank", "rank of |delta| in its row, from 0 (smallest) to 1", bounded=True),
    "variance": _m(
        "variance", "population variance of the deltas over the experts (SCE)", shared=True, cheap=True, bounded=True
    ),
    "energy": _m(
        "energy",
        "mean square of the surviving deltas, one number per tensor (SCE)",
        after_mask=True,
        options={"floor": 0.0},
        bounded=True,
    ),
    "pcb": _m(
        "pcb",
        "intra x inter competition, as released (PCB-Merging)",
        cheap=True,
        dear=True,
        options={"inter": "nlp", "temperature": None},
    ),
    "pcb_paper": _m("pcb_paper", "softmax intra x softmax inter, as published (PCB-Merging)", bounded=True),
    "tall_ratio": _m("tall_ratio", "|delta_i| / |sum of the others' deltas| (TALL masks, Consensus)", cheap=True),
    "cki": _m(
        "cki",
        "compatibility from disagreement and information content (CKI), without training",
        cheap=True,
        dear=True,
        ordered=True,
        bounded=True,
        options={"kind": "dual", "a": 0.4, "c": 500.0, "bins": 10, "gain": 1.0, "bias": 0.0, "sign": 1.0},
        reduce_options=("bins",),
    ),
    "random": _m("random", "counter-based uniform numbers: a control", reads_weights=False, bounded=True),
    "fisher": _m(
        "fisher",
        "diagonal Fisher information",
        needs_data=True,
        reads_weights=False,
        added="floor",
        options={"power": 1.0, "floor": 1e-6, "normalise": False, "at": "expert"},
    ),
    "gradient_product": _m("gradient_product", "|gradient x delta| per parameter", needs_data=True),
    "activation_norm": _m("activation_norm", "|delta| x norm of the input feature (Wanda)", needs_data=True),
    "apl": _m(
        "apl",
        "|cosine of gradient at the base and delta|, one number per tensor (APL)",
        needs_data=True,
        options={"normalise": True},
    ),
    "trust_region": _m(
        "trust_region",
        "sum over pairs of |gradient_i| |delta_j| (trust region)",
        needs_data=True,
        shared=True,
        options={"zero_shot": False},
    ),
    "external": _m(
        "external",
        "scores from a file (LRP, any attribution)",
        needs_data=True,
        reads_weights=False,
        options={"name": "external"},
    ),
}
"""Measures by the name that recipes use."""


def measure_of(assess: Assess) -> Measure:
    """The table's entry.

    Raises:
        RecipeError: unknown name or options, all at once.
    """
    if assess.options or assess.measure not in MEASURES:
        problems = options_problems(assess)
        if problems:
            raise RecipeError(problems)
    return MEASURES[assess.measure]


def options_problems(assess: Assess) -> list[str]:
    """What is wrong with a measure's name and options; empty if nothing is."""
    known = MEASURES.get(assess.measure)
    if known is None:
        return [f"assess: unknown measure {assess.measure!r}{nearest(assess.measure, MEASURES)}"]
    return [
        f"assess: measure {assess.measure!r} has no option {name!r}{nearest(name, known.options)}"
        for name in assess.options
        if name not in known.options
    ]


def option(context: AssessContext, name: str) -> float:
    """A numeric option."""
    return float(context.options[name])


_MODULES: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    """The module of a measure, imported on first use."""
    if name not in _MODULES:
        _MODULES[name] = importlib.import_module(MEASURES[name].target.partition(":")[0])
    return _MODULES[name]


def scores_of(
    source: Source, base: Tensor, deltas: Sequence[Tensor], raw: Sequence[Tensor], numbers: Sequence[Tensor]
) -> list[Tensor]:
    """Scores of a cheap measure inside a pass."""
    scores: list[Tensor] = _MODULES[source.measure].scores(
        AssessContext(base, deltas, raw, numbers, dict(source.options))
    )
    return scores

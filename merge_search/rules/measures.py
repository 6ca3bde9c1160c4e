"""Measures: rules that give every parameter of every expert a score. torch-free; `engine.methods.assess` has the
formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_search.rules.option_table import MEASURE_OPTIONS
from merge_search.rules.table import Rule, RuleTable, Scalar, option_problems

__all__ = ["MEASURES", "Measure", "anchors_of", "measure_problems"]


@dataclass(frozen=True, kw_only=True)
class Measure(Rule):
    """One row of `MEASURES`.

    Attributes:
        needs_data: It reads statistics that a provider must have measured.
        statistics: Kinds of the statistics that it reads; ``{option}`` stands for the value of a text option, ``{*}``
            for ``option=value`` of all options that differ from their defaults.
        data_free_option: A switch that makes it need no data.
        shared: All experts have the same scores.
        per_tensor: One number for all parameters of an expert's tensor.
        partition: Option that says which tensors share one number (`recipe.Group.key`); '' where each has its own.
        is_constant: One number for everything.
        is_random: Scores depend on the recipe's seed.
        ordered: The order of the experts in the recipe matters.
        bounded: Scores are finite and not negative, so that score-weighted means stay between the deltas.
        at_coefficients: (option, value) with which scores depend on the recipe's coefficients; ("", "") for always.
        cheap: Element-wise; recomputed inside the pass.
        is_costly: Cheap, but slower to make than to read: scores are kept, where there is room, once asked for twice.
        reads_weights: Its function reads more of base and deltas than the base's shape and device.
        after_mask: Its scores are made from the surviving deltas (mixing scores only).
        added: The option that is added to every score: passes do that themselves, so that scores need no copy for it.
        reduce_options: Options that the reduction over whole tensors depends on.
    """

    needs_data: bool = False
    statistics: tuple[str, ...] = ()
    data_free_option: str = ""
    shared: bool = False
    per_tensor: bool = False
    partition: str = ""
    is_constant: bool = False
    is_random: bool = False
    ordered: bool = False
    bounded: bool = False
    at_coefficients: tuple[str, Scalar] | None = None
    cheap: bool = False
    is_costly: bool = False
    reads_weights: bool = True
    after_mask: bool = False
    added: str = ""
    reduce_options: tuple[str, ...] = ()

    def depends_on_coefficients(self, options: Mapping[str, Scalar]) -> bool:
        """Whether scores under these options of a recipe depend on its coefficients."""
        if self.at_coefficients is None:
            return False
        option, value = self.at_coefficients
        return not option or self.completed(options).get(option) == value

    def statistics_asked(self, options: Mapping[str, Scalar]) -> tuple[str, ...]:
        """Kinds of statistics that scores under these options of a recipe are made from."""
        if not self.needs_data or (self.data_free_option and options.get(self.data_free_option) is True):
            return ()
        completed = self.completed(options)
        if self.is_outside:  # its function gets them like this, and asks by their text
            completed = self.typed(completed)
        changed = ",".join(f"{k}={completed[k]}" for k in sorted(completed) if completed[k] != self.options.get(k))
        return tuple(kind.format_map({**completed, "*": changed}).rstrip("@") for kind in self.statistics)


def anchors_of(coefficient: float, step: float) -> tuple[tuple[float, float], ...]:
    """The multiples of `step` beside a coefficient, with weights that sum to one; the coefficient itself for step 0.

    >>> anchors_of(0.6, 0.5), anchors_of(0.5, 0.5), anchors_of(0.6, 0)
    (((0.5, 0.8), (1.0, 0.2)), ((0.5, 1.0),), ((0.6, 1.0),))
    """
    if not step:
        return ((coefficient, 1.0),)
    below = math.floor(coefficient / step)
    above = round(coefficient / step - below, 9)
    ends = ((below * step, round(1.0 - above, 9)), ((below + 1) * step, above))
    return tuple((at, weight) for at, weight in ends if weight > 0)


_HERE = "merge_search.engine.methods.assess"


def _m(name: str, summary: str, **rest: Any) -> Measure:
    about = MEASURE_OPTIONS.get(name, {})
    return Measure(name=name, summary=summary, target=f"{_HERE}.{name}:scores", about=about, **rest)


MEASURES: RuleTable[Measure] = RuleTable("measure", (
    _m("ones", "every parameter alike", is_constant=True, shared=True, cheap=True, bounded=True),
    _m("magnitude", "|delta|", cheap=True, bounded=True),
    _m("rank", "rank of |delta| in its row, from 0 (smallest) to 1", bounded=True),
    _m(
        "variance", "population variance of the deltas over the experts (SCE)",
        shared=True, cheap=True, bounded=True,
    ),
    _m(
        "energy", "mean square of the surviving deltas, one number per tensor (SCE)",
        after_mask=True, per_tensor=True, bounded=True, options={"floor": 0.0},
    ),
    _m(
        "pcb", "intra x inter competition, as released (PCB-Merging)",
        cheap=True, is_costly=True, options={"inter": "nlp", "temperature": None},
        choices={"inter": ("nlp", "vision", "es")},
    ),
    _m(
        "pcb_paper", "softmax intra x softmax inter, as published (PCB-Merging)", bounded=True,
        options={"scope": "tensor", "centred": False}, choices={"scope": ("tensor", "model")},
    ),
    _m("tall_ratio", "|delta_i| / |sum of the others' deltas| (TALL masks, Consensus)", cheap=True),
    _m(
        "cki", "compatibility from disagreement and information content (CKI), without training",
        cheap=True, is_costly=True, ordered=True, bounded=True, reduce_options=("bins",),
        options={"kind": "dual", "a": 0.4, "c": 500.0, "bins": 10, "gain": 1.0, "bias": 0.0, "sign": 1.0,
                 "standardise": "expert", "order": "given", "only": "", "rest": "first"},
        choices={"kind": ("dual", "local", "global", "recommender"), "standardise": ("expert", "all"),
                 "order": ("given", "reversed"), "rest": ("first", "last", "base")},
    ),
    _m(
        "cki_learned", "compatibility whose local map is trained on fit rows (CKI)",
        needs_data=True, statistics=("cki_map@{*}",), ordered=True, bounded=True, reduce_options=("bins",),
        options={"kind": "dual", "a": 0.4, "c": 500.0, "bins": 10, "gain": 1.0, "sign": 1.0, "order": "given",
                 "only": "", "rest": "first", "map": "full", "inputs": "standardised", "start": "identity",
                 "epochs": 10, "step_size": 0.01, "batch_rows": 16},
        choices={"kind": ("dual", "local", "recommender"), "order": ("given", "reversed"),
                 "rest": ("first", "last", "base"), "map": ("full", "diagonal", "scalar"),
                 "inputs": ("standardised", "raw"), "start": ("identity", "xavier")},
    ),
    _m("random", "counter-based uniform numbers: a control", is_random=True, reads_weights=False, bounded=True),
    _m(
        "fisher", "diagonal Fisher information", needs_data=True, statistics=("{kind}",),
        reads_weights=False, added="floor", at_coefficients=("at", "scaled"),
        options={"power": 1.0, "floor": 1e-6, "normalise": False, "at": "expert", "kind": "fisher", "anchors": 0.0},
        choices={"at": ("expert", "scaled"), "kind": ("fisher", "true_fisher")},
    ),
    _m("gradient_product", "|gradient x delta| per parameter", needs_data=True, statistics=("gradient",)),
    _m(
        "activation_norm", "|delta| x norm of the input feature (Wanda)",
        needs_data=True, statistics=("activation_norm",),
    ),
    _m(
        "apl", "|cosine of gradient at the base and delta|, one number per tensor (APL)",
        needs_data=True, statistics=("gradient",), per_tensor=True, options={"normalise": True},
    ),
    _m(
        "causal_effect", "change of the loss by an intervention on a part of the model, one number a part (APL)",
        needs_data=True, statistics=("effect@form={form},partition={partition}",), per_tensor=True,
        reads_weights=False, bounded=True, partition="partition",
        options={"form": "gradient", "partition": "block", "average": "loss"},
        choices={"form": ("gradient", "activation", "ablation"), "average": ("loss", "rows"),
                 "partition": ("model", "block", "block_kind", "tensor")},
    ),
    _m(
        "trust_region", "sum over pairs of |gradient_i| |delta_j| (trust region)",
        needs_data=True, statistics=("absolute_gradient",), data_free_option="zero_shot", shared=True,
        options={"zero_shot": False},
    ),
    _m(
        "external", "scores from a file (LRP, any attribution)",
        needs_data=True, statistics=("{name}",), reads_weights=False, options={"name": "external"},
    ),
))  # fmt: skip
"""Measures by the name that recipes use."""


def measure_problems(name: str, options: Mapping[str, Scalar]) -> list[str]:
    """What is wrong with a measure's name and options; empty if nothing is."""
    if problem := MEASURES.unknown(name):
        return [f"assess: {problem}"]
    row = MEASURES[name]
    return [f"assess: measure {problem}" for problem in option_problems(row, options, check_values=row.is_outside)]

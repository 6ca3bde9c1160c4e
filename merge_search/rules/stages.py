"""Selections (which parameters of a delta are kept) and splices (how surviving deltas are combined). torch-free.

`engine.methods.stages` has the formulas of the built-in ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from merge_search.rules.option_table import STAGE_OPTIONS
from merge_search.rules.table import Rule, RuleTable, Scalar

__all__ = ["SELECTIONS", "SPLICES", "STAGES", "Selection", "Splicing", "select_fields"]

SCOPES = ("row", "tensor", "model")


@dataclass(frozen=True, kw_only=True)
class Selection(Rule):
    """One row of `SELECTIONS`.

    Attributes:
        uses_scores: Scores decide; without, they do not change a bit.
        uses_density: Densities decide.
        is_random: Masks depend on the recipe's seed.
        is_hard: Masks are zeros and ones, not shares.
        compares: Scores are compared with each other: scores that are all alike select nothing meaningful.
        scopes: What may be ranked together.
        takes_exclusive: An expert's mask can be kept off what earlier experts kept.
        rescale: The `Rescale.kind` with which the mean over random masks is the whole delta; ``none`` for others.
        rounds: It keeps a whole number of parameters, rounded as `Select.rounding` says.
        needs_position: Its masks depend on an element's position within the pass.
        is_element_wise: Its numbers are counts or orders: none is a sum of floats, which threads may add up in another
        order. steps: Densities act in steps: a whole number of parameters per block is kept.
        usual: Published options, for a search space that names the kind alone.
        needs: A field of `Select` that must be given, with an example; '' for none.
        reads: Fields of `Select` that change what is kept.
    """

    uses_scores: bool = True
    uses_density: bool = True
    is_random: bool = False
    is_hard: bool = True
    compares: bool = True
    scopes: tuple[str, ...] = SCOPES
    takes_exclusive: bool = True
    rescale: str = "none"
    rounds: bool = False
    needs_position: bool = False
    is_element_wise: bool = False
    steps: bool = False
    usual: Mapping[str, Scalar] = field(default_factory=dict)
    needs: str = ""
    reads: tuple[str, ...] = ("exclusive", "gate", "vectors")


@dataclass(frozen=True, kw_only=True)
class Splicing(Rule):
    """One row of `SPLICES`.

    Attributes:
        is_scored: Mixing scores decide.
        is_linear: The combined delta is linear in the coefficients, masks held fixed.
        adds_up: Coefficients add up over the experts: the more experts, the smaller each should be.
        divides_by_coefficients: By their sum, which must not change sign and forgets their common size.
        is_plain_of_all: Where all experts survive and agree it is ``sum`` with other coefficients.
        with_hard_masks: The kind that it is where masks are zeros and ones; '' for itself.
        ordered: The order of the experts in the recipe matters.
        reads: Fields of `Splice` that change the result.
    """

    is_scored: bool = False
    is_linear: bool = True
    adds_up: bool = False
    divides_by_coefficients: bool = False
    is_plain_of_all: bool = False
    with_hard_masks: str = ""
    ordered: bool = False
    reads: tuple[str, ...] = ("unique_boost", "boost_cap")


_NOT_ROWS = ("tensor", "model")
_RANKED = ("scope", "exclusive", "gate", "vectors")
_COUNTED = ("nonzero", "rounding", *_RANKED)

SELECTIONS: RuleTable[Selection] = RuleTable("selection", (
    Selection(
        name="all", summary="everything",
        uses_scores=False, uses_density=False, compares=False, takes_exclusive=False, is_element_wise=True, reads=(),
    ),
    Selection(
        name="top_k", summary="the density's share of the largest scores",
        rounds=True, needs_position=True, is_element_wise=True, reads=_COUNTED,
    ),
    Selection(
        name="threshold", summary="scores above a given number",
        uses_density=False, compares=False, is_element_wise=True, needs="threshold: 1.0e-5",
        reads=("threshold", "exclusive", "gate", "vectors"),
    ),
    Selection(
        name="band", summary="drop the share gamma of the largest scores, keep the density's share of the next",
        rounds=True, needs_position=True, is_element_wise=True, usual={"gamma": 0.01}, reads=("gamma", *_COUNTED),
    ),
    Selection(
        name="bernoulli", summary="each parameter at random, with probability density (DARE)",
        uses_scores=False, is_random=True, compares=False, rescale="inverse_density", needs_position=True,
        is_element_wise=True,
    ),
    Selection(
        name="rank_probability", summary="at random, with a probability that rises with the score's rank (DELLA)",
        is_random=True, rescale="inverse_probability", needs_position=True, usual={"scope": "row", "epsilon": 0.07},
        reads=("epsilon", *_RANKED),
    ),
    Selection(
        name="proportional", summary="at random, with a probability proportional to the score",
        is_random=True, rescale="inverse_probability", needs_position=True, scopes=_NOT_ROWS, reads=_RANKED,
    ),
    Selection(
        name="soft_threshold", summary="masks between 0 and 1 that rise with the score above a quantile (PCB)",
        is_hard=False, takes_exclusive=False, rounds=True, is_element_wise=True, scopes=_NOT_ROWS,
        usual={"scope": "model"}, reads=("scope", "nonzero", "rounding", "gate", "vectors"),
    ),
    Selection(
        name="n_m", summary="the density's share of every few consecutive entries of a row (CABS)", steps=True,
        reads=("block_size", "exclusive", "gate", "vectors"),
    ),
    Selection(
        name="mass", summary="the largest scores until their sum is the density's share of the total",
        needs_position=True, scopes=_NOT_ROWS, reads=_RANKED,
    ),
))  # fmt: skip
"""Selections by the name that recipes use."""

SPLICES: RuleTable[Splicing] = RuleTable("splice", (
    Splicing(name="sum", summary="sum of the deltas times their coefficients", adds_up=True),
    Splicing(name="count", summary="the sum over the number of survivors (TIES)", is_plain_of_all=True),
    Splicing(name="mask", summary="the sum over the sum of the masks", with_hard_masks="count"),
    Splicing(
        name="coefficient", summary="the sum over the sum of the survivors' coefficients",
        is_linear=False, divides_by_coefficients=True, is_plain_of_all=True,
    ),
    Splicing(name="score", summary="mean weighted by mixing scores (soft splicing)", is_scored=True),
    Splicing(
        name="softmax", summary="mean weighted by a softmax of the logarithms of mixing scores", is_scored=True,
        reads=("temperature", "unique_boost", "boost_cap"),
    ),
    Splicing(
        name="argmax", summary="at every entry the expert with the largest mixing score (hard splicing)",
        is_scored=True, ordered=True, reads=("ties", "unique_boost", "boost_cap"),
    ),
))  # fmt: skip
"""Splices by the name that recipes use."""


def _stage(name: str, summary: str, options: Mapping[str, Scalar], **choices: tuple[str, ...]) -> Rule:
    return Rule(name=name, summary=summary, options=options, choices=choices, about=STAGE_OPTIONS[name])


STAGES: RuleTable[Rule] = RuleTable("stage", (
    _stage(
        "winsorise", "clips deltas before anything else", {"winsorise": 0.0, "winsorise_limits": "interpolated"},
        winsorise_limits=("interpolated", "released"),
    ),
    _stage(
        "allocate", "spreads densities and coefficients over the tensors by their importance",
        {"allocate": "none", "spread": 0.0, "floor": 0.01, "coefficient_power": 0.0},
    ),
    _stage(
        "select", "keeps a part of every delta",
        {
            "scope": "tensor", "threshold": 0.0, "gamma": 0.0, "rounding": "nearest", "epsilon": 0.0, "block_size": 4,
            "exclusive": False, "gate": 0, "nonzero": False, "vectors": False,
        },
        scope=SCOPES, rounding=("nearest", "down"),
    ),
    _stage(
        "rescale", "scales what is kept", {"rescale": "none"},
        rescale=("none", "inverse_density", "inverse_probability", "match_l1", "match_l2"),
    ),
    _stage(
        "resolve", "elects signs", {"weighted": False, "tie": "plus"}, tie=("plus", "minus", "majority", "drop")
    ),
    _stage(
        "splice", "combines the deltas",
        {"temperature": 1.0, "ties": "first", "unique_boost": 0.0, "boost_cap": 0.2}, ties=("first", "last"),
    ),
    _stage("scale", "scales the combined delta", {"scale": 1.0}),
))  # fmt: skip
"""Stages of a recipe with their numbers, switches and words, which a study file may set beside the rules' options."""


def select_fields(selection: Selection) -> Rule:
    """The fields of a recipe's ``select`` as the options of a row, with what this selection can rank together."""
    return replace(STAGES["select"], choices={**STAGES["select"].choices, "scope": selection.scopes})

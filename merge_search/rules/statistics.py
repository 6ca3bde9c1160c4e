"""Statistics: numbers measured on data, once per study, for measures and operators to read.

A statistic is a function

    measure(work, *, option=default, ...) -> dict of tensor name -> tensor

that runs while the live model holds the weights of its `StatisticInfo.point` (`engine.statistics.rows.Work`). Rules ask
for it by a name that says the options which differ from their defaults, ``effect@form=ablation,partition=model``, or
the multiple of the delta at which it is measured, ``fisher@0.5``. torch-free; `engine.statistics` has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from merge_search.rules.measures import MEASURES
from merge_search.rules.option_table import MEASURE_OPTIONS, OPERATOR_OPTIONS
from merge_search.rules.table import Rule, RuleTable, Scalar

__all__ = ["STATISTICS", "StatisticInfo", "statistic_named"]


@dataclass(frozen=True, kw_only=True)
class StatisticInfo(Rule):
    """One row of `STATISTICS`.

    Attributes:
        point: The weights at which it is measured: ``base``, ``expert``, or ``either``. ``either`` is the expert, or
            base + c delta where the statistic is asked for as ``NAME@c``; such a statistic has no options.
        reads: Models whose weights the numbers depend on: that of the ``point``, base and expert (``pair``), or base
            and ``all`` experts in their order.
        questions: Questions counted per row: one for a forward pass, two more for a backward pass. It reports all
            others by `Work.on_asked`.
        broadcasts: Its tensors broadcast to the weights. Without, only rules that know their shapes can read them.
        is_gram: Its tensors have the inputs of a matrix as rows and as columns, which is much for wide models.
        version: Changed when a statistic from outside measures other numbers, so that stored ones are not used.
    """

    point: Literal["base", "expert", "either"] = "expert"
    reads: Literal["point", "pair", "all"] = "point"
    questions: int = 0
    broadcasts: bool = True
    is_gram: bool = False
    version: int = 1

    @property
    def n_prompts(self) -> int | None:
        """Its option ``prompts``: most prompts of each task, which it reads without their answers. None: it reads the
        study's rows, with answers."""
        return int(self.completed({})["prompts"]) if "prompts" in self.options else None

    @property
    def is_of_one_expert(self) -> bool:
        """Whether its numbers depend on the expert that it is asked for."""
        return self.point != "base" or self.reads == "pair"


def _s(name: str, summary: str, **rest: Any) -> StatisticInfo:
    return StatisticInfo(name=name, summary=summary, target=f"merge_search.engine.statistics.{name}:measure", **rest)


_CKI, _EFFECT = MEASURES["cki_learned"], MEASURES["causal_effect"]
_FORMS = ("form", "partition")

STATISTICS: RuleTable[StatisticInfo] = RuleTable("statistic", (
    _s("fisher", "mean of squared gradients, row by row", point="either", questions=3),
    _s("true_fisher", "mean of squared gradients over all answers by p", point="either", questions=1),
    _s("gradient", "mean gradient of the loss at the base", point="base", questions=3),
    _s("absolute_gradient", "mean of absolute gradients at the base, row by row", point="base", questions=3),
    _s("activation_norm", "root mean square of every input feature", questions=1),
    _s("gram", "X^T X / n of the inputs of every matrix", questions=1, broadcasts=False, is_gram=True),
    _s(
        "prompt_gram", "X^T X / n of the inputs of every matrix on few prompts", questions=1, broadcasts=False,
        is_gram=True,
        options={"prompts": 64}, about={"prompts": OPERATOR_OPTIONS["regmean_parts"]["prompts"]},
    ),
    _s(
        "effect", "change of the loss by an intervention on a part of the model",
        point="base", reads="pair", broadcasts=False,
        options={k: _EFFECT.options[k] for k in _FORMS}, choices={k: _EFFECT.choices[k] for k in _FORMS},
        about={k: MEASURE_OPTIONS["causal_effect"][k] for k in _FORMS},
    ),
    _s(
        "cki_map", "CKI's learned map of every spliced matrix", point="base", reads="all", broadcasts=False,
        options=_CKI.options, choices=_CKI.choices, about=_CKI.about,
    ),
))  # fmt: skip
"""Statistics by the name under which measures and operators ask for them."""


def statistic_named(kind: str) -> tuple[StatisticInfo, float | None] | None:
    """The row that a name means, with the name's options in place of the defaults, and c; None at the model itself.

    Returns:
        None where no such statistic is measured.
    Example:
        >>> statistic_named("fisher@0.5")[1]
        0.5
        >>> statistic_named("external") is None
        True
        >>> statistic_named("effect@partition=model")[0].options["partition"]
        'model'
    """
    name, at, text = kind.partition("@")
    row = STATISTICS.get(name)
    if row is None or not at:
        return None if row is None else (row, None)
    try:
        if row.options:
            return replace(row, options=_read_options(row, text)), None
        c = float(text)
    except (KeyError, ValueError):
        return None
    return (row, c) if row.point == "either" and math.isfinite(c) else None


def _read_options(row: StatisticInfo, text: str) -> dict[str, Scalar | None]:
    """The options of a name over the defaults.

    Raises:
        KeyError, ValueError: one is unknown or has a value that is not allowed.
    """
    options = dict(row.options)
    for item in text.split(","):
        key, _, value = item.partition("=")
        options[key] = _read_value(options[key], value)
        if value not in row.choices.get(key, (value,)):
            raise ValueError(f"{key} must be one of {', '.join(row.choices[key])}, got {value!r}")
    return options


def _read_value(default: Scalar | None, text: str) -> Scalar:
    """A text as a value of the type of its default; without one it is a number."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return {"True": True, "False": False}[text]
    value = float(text)
    if not isinstance(default, int):
        return value
    if not value.is_integer():
        raise ValueError(f"must be a whole number, got {text}")
    return int(value)

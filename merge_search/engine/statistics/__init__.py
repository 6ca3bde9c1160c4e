"""Statistics: numbers measured on data, once per study. This file lists them without importing torch.

There is one file a statistic. A statistic is a module with

    measure(work: Work) -> dict[str, Tensor]     tensor name on disk -> float32, broadcastable to the tensor

A statistic with settings takes them as arguments. Its name says those that differ from the defaults of its row:
``effect@form=ablation,partition=model``.

It runs while the live model holds the weights of its `Kind.point`, on rows that a learner may fit on, never on scored
questions.

    provider.py   DataStatistics: chooses rows and weights, borrows the live model, caches the results
    store.py      files: named by the hash of all that matters, written whole or not at all, checked when read
    rows.py       what a statistic may read, and which rows it gets
    backward.py, forward.py   one pass per row: gradients, inputs of matrices
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from merge_search.recipe import Group, Scalar

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.statistics.rows import Work

__all__ = ["KINDS", "PARTITIONS", "Kind", "load", "parse"]


@dataclass(frozen=True)
class Kind:
    """One entry of `KINDS`.

    Attributes:
        module: Name of its module in this package.
        summary: One line.
        point: The weights at which it is measured: ``base``, ``expert``, or ``either``. ``either`` is the expert, or
            base + c delta where the kind is asked for as ``<kind>@<c>``.
        questions: Questions counted per row: one for a forward pass, two more for a backward pass. A function of the
            settings and the groups that the expert changed, where these decide it.
        settings: What a name can set, with defaults.
        choices: Allowed values of text settings.
        reads: Models whose weights the numbers depend on: that of the ``point``, base and expert (``pair``), or base
            and ``all`` experts in their order.
    """

    module: str
    summary: str
    point: Literal["base", "expert", "either"]
    questions: int | Callable[[Mapping[str, Scalar], Collection[Group]], int]
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads: Literal["point", "pair", "all"] = "point"

    def questions_per_row(self, groups: Collection[Group]) -> int:
        """Questions counted per row of an expert that changed the tensors of `groups`."""
        return self.questions if isinstance(self.questions, int) else self.questions(self.settings, groups)


PARTITIONS = ("model", "block", "block_kind", "tensor")
"""What counts as one part of a model, as in `Group.key`."""


def _effect_questions(settings: Mapping[str, Scalar], groups: Collection[Group]) -> int:
    return 3 if settings["form"] == "gradient" else 1 + len({g.key(str(settings["partition"])) for g in groups})


KINDS: dict[str, Kind] = {
    "fisher": Kind("fisher", "mean of squared gradients, row by row", "either", 3),
    "gradient": Kind("gradient", "mean gradient of the loss at the base", "base", 3),
    "absolute_gradient": Kind("absolute_gradient", "mean of absolute gradients at the base, row by row", "base", 3),
    "activation_norm": Kind("activation_norm", "root mean square of every input feature", "expert", 1),
    "gram": Kind("gram", "X^T X / n of the inputs of every matrix", "expert", 1),
    "effect": Kind(
        "effect", "change of the loss by an intervention on a part of the model", "base", _effect_questions,
        reads="pair",
        settings={"form": "gradient", "partition": "block"},
        choices={"form": ("gradient", "activation", "ablation"), "partition": PARTITIONS},
    ),
}  # fmt: skip
"""Statistics by the name under which measures and operators ask for them."""


def parse(kind: str) -> tuple[Kind, float | None] | None:
    """Split the name of a kind into its entry and c; c is None at the model itself.

    Returns:
        None where no such statistic is measured.
    Example:
        >>> parse("fisher@0.5")[1]
        0.5
        >>> parse("external") is None
        True
        >>> parse("effect@partition=model")[0].settings["partition"]
        'model'
    """
    name, at, c = kind.partition("@")
    entry = KINDS.get(name)
    if entry is None:
        return None
    if not at:
        return entry, None
    if entry.settings:
        settings = _read_settings(entry, c)
        return None if settings is None else (replace(entry, settings=settings), None)
    if entry.point != "either":
        return None
    try:
        value = float(c)
    except ValueError:
        return None
    return (entry, value) if math.isfinite(value) else None


def _read_settings(entry: Kind, text: str) -> dict[str, Scalar] | None:
    """The settings of a name over the defaults; None if one is unknown or has no allowed value."""
    settings = dict(entry.settings)
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in settings or value not in entry.choices.get(key, (value,)):
            return None
        default = settings[key]
        try:
            settings[key] = value == "True" if isinstance(default, bool) else type(default)(value)
        except ValueError:
            return None
    return settings


def load(kind: Kind) -> Callable[[Work], dict[str, Tensor]]:
    """Import the function that measures a statistic."""
    module = importlib.import_module(f"{__name__}.{kind.module}")
    measure: Callable[[Work], dict[str, Tensor]] = module.measure
    return partial(measure, **kind.settings) if kind.settings else measure

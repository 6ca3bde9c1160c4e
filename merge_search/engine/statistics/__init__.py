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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from merge_search.recipe import Group, Scalar
from merge_search.rules import MEASURES

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.statistics.rows import Work

__all__ = ["KINDS", "PARTITIONS", "Kind", "held_out", "load", "parse"]


@dataclass(frozen=True)
class Kind:
    """One entry of `KINDS`.

    Attributes:
        module: Name of its module in this package.
        summary: One line.
        point: The weights at which it is measured: ``base``, ``expert``, or ``either``. ``either`` is the expert, or
            base + c delta where the kind is asked for as ``<kind>@<c>``.
        questions: Questions counted per row: one for a forward pass, two more for a backward pass. What differs between
            rows, `Work.on_asked` reports. Or a function of the settings, the groups that the expert changed, and the
            tasks' numbers of rows.
        settings: What a name can set, with defaults.
        choices: Allowed values of text settings.
        reads: Models whose weights the numbers depend on: that of the ``point``, base and expert (``pair``), or base
            and ``all`` experts in their order.
    """

    module: str
    summary: str
    point: Literal["base", "expert", "either"]
    questions: int | Callable[[Mapping[str, Scalar], Collection[Group], Sequence[int]], int]
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads: Literal["point", "pair", "all"] = "point"

    @property
    def n_prompts(self) -> int | None:
        """Most prompts of each task that it reads, without their answers; None: the study's rows, with answers."""
        return int(self.settings["prompts"]) if "prompts" in self.settings else None

    def asked(self, groups: Collection[Group], n_rows: Sequence[int]) -> int:
        """Questions of a measurement on tasks of `n_rows` rows, for an expert that changed the tensors of `groups`."""
        if isinstance(self.questions, int):
            return self.questions * sum(n_rows)
        return self.questions(self.settings, groups, n_rows)


PARTITIONS = ("model", "block", "block_kind", "tensor")
"""What counts as one part of a model, as in `Group.key`."""


def _effect_questions(settings: Mapping[str, Scalar], groups: Collection[Group], n_rows: Sequence[int]) -> int:
    per_row = 3 if settings["form"] == "gradient" else 1 + len({g.key(str(settings["partition"])) for g in groups})
    return per_row * sum(n_rows)


def held_out(n_rows: int) -> int:
    """Number of a task's rows on which epochs of a training are compared; 0: on the one row that there is."""
    return min(n_rows - 1, max(1, n_rows // 5))


def _map_questions(settings: Mapping[str, Scalar], groups: Collection[Group], n_rows: Sequence[int]) -> int:
    epochs, kept = int(settings["epochs"]), [held_out(n) for n in n_rows]
    trained = sum(n - k for n, k in zip(n_rows, kept, strict=True))
    return 3 * epochs * trained + (epochs + 1) * sum(max(1, k) for k in kept)


KINDS: dict[str, Kind] = {
    "fisher": Kind("fisher", "mean of squared gradients, row by row", "either", 3),
    "true_fisher": Kind("true_fisher", "mean of squared gradients over all answers by p", "either", 1),
    "gradient": Kind("gradient", "mean gradient of the loss at the base", "base", 3),
    "absolute_gradient": Kind("absolute_gradient", "mean of absolute gradients at the base, row by row", "base", 3),
    "activation_norm": Kind("activation_norm", "root mean square of every input feature", "expert", 1),
    "gram": Kind("gram", "X^T X / n of the inputs of every matrix", "expert", 1),
    "prompt_gram": Kind(
        "prompt_gram", "X^T X / n of the inputs of every matrix on few prompts", "expert", 1,
        settings={"prompts": 64},
    ),
    "effect": Kind(
        "effect", "change of the loss by an intervention on a part of the model", "base", _effect_questions,
        reads="pair",
        settings={"form": "gradient", "partition": "block"},
        choices={"form": ("gradient", "activation", "ablation"), "partition": PARTITIONS},
    ),
    "cki_map": Kind(
        "cki_map", "CKI's learned map of every spliced matrix", "base", _map_questions, reads="all",
        settings={k: v for k, v in MEASURES["cki_learned"].options.items() if v is not None},
        choices=MEASURES["cki_learned"].choices,
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
            if isinstance(default, str):
                settings[key] = value
            elif isinstance(default, int) and not float(value).is_integer():
                return None
            else:
                settings[key] = type(default)(float(value))
        except ValueError:
            return None
    return settings


def load(kind: Kind) -> Callable[[Work], dict[str, Tensor]]:
    """Import the function that measures a statistic."""
    module = importlib.import_module(f"{__name__}.{kind.module}")
    measure: Callable[[Work], dict[str, Tensor]] = module.measure
    settings = {name: value for name, value in kind.settings.items() if name != "prompts"}
    return partial(measure, **settings) if settings else measure

"""Statistics: numbers measured on data, once per study. This file lists them without importing torch.

There is one file a statistic. A statistic is a module with

    measure(work: Work) -> dict[str, Tensor]     tensor name on disk -> float32, broadcastable to the tensor

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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from merge_search.engine.statistics.rows import Work

__all__ = ["KINDS", "Kind", "load", "parse"]


@dataclass(frozen=True)
class Kind:
    """One entry of `KINDS`.

    Attributes:
        module: Name of its module in this package.
        summary: One line.
        point: The weights at which it is measured: ``base``, ``expert``, or ``either``. ``either`` is the expert, or
            base + c delta where the kind is asked for as ``<kind>@<c>``.
        questions: Questions counted per row: one for a forward pass, two more for a backward pass. What differs between
            rows, `Work.on_asked` reports.
    """

    module: str
    summary: str
    point: Literal["base", "expert", "either"]
    questions: int


KINDS: dict[str, Kind] = {
    "fisher": Kind("fisher", "mean of squared gradients, row by row", "either", 3),
    "true_fisher": Kind("true_fisher", "mean of squared gradients over all answers by p", "either", 1),
    "gradient": Kind("gradient", "mean gradient of the loss at the base", "base", 3),
    "absolute_gradient": Kind("absolute_gradient", "mean of absolute gradients at the base, row by row", "base", 3),
    "activation_norm": Kind("activation_norm", "root mean square of every input feature", "expert", 1),
    "gram": Kind("gram", "X^T X / n of the inputs of every matrix", "expert", 1),
}
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
    """
    name, at, c = kind.partition("@")
    entry = KINDS.get(name)
    if entry is None or (at and entry.point != "either"):
        return None
    if not at:
        return entry, None
    try:
        value = float(c)
    except ValueError:
        return None
    return (entry, value) if math.isfinite(value) else None


def load(kind: Kind) -> Callable[[Work], dict[str, Tensor]]:
    """Import the function that measures a statistic."""
    module = importlib.import_module(f"{__name__}.{kind.module}")
    measure: Callable[[Work], dict[str, Tensor]] = module.measure
    return measure

"""One measurement by any statistic, with checks of what one from outside returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from merge_search.engine.methods.outside import Call
from merge_search.engine.statistics.rows import Work
from merge_search.errors import nearest
from merge_search.rules import StatisticInfo
from merge_search.rules.table import load

__all__ = ["measured"]


def measured(row: StatisticInfo, work: Work) -> dict[str, Tensor]:
    """Return what a statistic measures, by tensor name: float32, on whatever devices. Tensors may be missing.

    Args:
        row: The statistic, with the options that it is asked for with.
        work: The live model, which may hold any weights afterwards. Models and expert are left out of it where the row
            says that numbers do not depend on them, since a stored file is found without them.
    Raises:
        RuleError: A statistic from outside failed, or returned other names, shapes or dtypes than it may.
        NonFiniteError: NaN or infinity.
        EvaluationError: A loss failed.
    """
    models = None if row.reads == "point" else work.models
    work = replace(work, models=models, expert=work.expert if row.is_of_one_expert else "")
    if not row.is_outside:
        return load(row)(work, **row.completed({}))  # type: ignore[no-any-return]
    call = Call("statistic", row)
    result = call(row.completed({}), work, given=())
    if not isinstance(result, Mapping):
        call.refuse(f"must be a dictionary from tensor name to tensor, got {type(result).__name__}", work.expert)
    result = dict(result)
    return {name: _checked(row, work, name, result.pop(name)) for name in tuple(result)}


def _checked(row: StatisticInfo, work: Work, name: Any, value: object) -> Tensor:
    if name not in work.views:
        problem = f"must be named like the merged tensors, got {name!r}{nearest(str(name), work.views)}"
        Call("statistic", row).refuse(problem, work.expert)
    call = Call("statistic", row, work.groups[name])
    if not isinstance(value, Tensor):
        call.refuse(f"must be a tensor, got {type(value).__name__}", work.expert)
    if row.broadcasts:
        call.require_broadcastable(value, tuple(work.views[name].shape), work.expert)
    if value.is_floating_point():
        value = value.detach().to("cpu", torch.float32, copy=True)  # it may be a view of the live weights
    call.require_floats(value, work.expert)
    return value

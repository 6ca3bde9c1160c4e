"""What the stored trials say, as tensors.

What the run loop stores with every COMPLETE trial:
    user_attrs["noise"]       {"value": variance}, {"values": [variance, ...]} for several objectives, and
                              {"constraint:NAME": variance} for every constraint; of the stored mean, in its
                              own units squared
    user_attrs["imported"]    true: came without a variance (so may {"value": None})
    user_attrs["fidelity"]    share of the questions asked; 1 where absent
    user_attrs["same_as"]     another trial of the same recipe, whose scores it took
    user_attrs["outcome"]     an `Outcome`; decides whether a FAIL says something about its point
    user_attrs["cost"]        [seconds to merge, seconds to evaluate, questions asked]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from merge_search.errors import StorageError
from merge_search.outcome import Outcome
from merge_search.search.samplers.unit_cube import CUT_ATTRIBUTE, UnitCube

__all__ = [
    "POINT_ATTRIBUTE",
    "REPEAT_ATTRIBUTE",
    "History",
    "Quantity",
    "coordinates",
    "objective_variances",
    "read_history",
    "signs",
]

POINT_ATTRIBUTE = "merge_search:point"
"""System attribute: coordinates of a running trial, there before its first parameter is stored."""

REPEAT_ATTRIBUTE = "same_as"
"""Number of the trial whose scores a trial of the same recipe took."""

CRASHED = frozenset(
    {Outcome.NON_FINITE, Outcome.OUT_OF_MEMORY, Outcome.EVALUATOR_ERROR, Outcome.MERGE_ERROR, Outcome.DIED}
)
"""Failures that belong to the point. A lost worker says nothing about it."""


FAR, VERY_NOISY, FEWEST_TO_TAME = 20.0, 100.0, 4
"""When a value belongs to a broken model, see `_tamed`."""


@dataclass(frozen=True)
class Quantity:
    """Noisy measurements of one quantity.

    Attributes:
        points: Coordinates, see `UnitCube`. Shape (n, d), float64.
        values: Shape (n,), float64, finite.
        variances: Of the values' noise, shape (n,); None where no trial knows its own.
    """

    points: Tensor
    values: Tensor
    variances: Tensor | None


@dataclass(frozen=True)
class History:
    """Trials that belong to the space; the others (baselines, imported points out of bounds) are left out.

    Attributes:
        numbers: Of the complete trials, in order.
        objectives: One per objective, larger is better, at the points of `numbers`.
        constraints: By name, feasible where <= 0; only trials that measured them.
        failed, pending: Shape (n, d): crashed and running trials.
        questions: Asked by each trial of `numbers`, 0 where nothing is known. Shape (n,), float64.
    """

    numbers: list[int]
    objectives: list[Quantity]
    constraints: dict[str, Quantity]
    failed: Tensor
    pending: Tensor
    questions: Tensor

    @property
    def points(self) -> Tensor:
        return self.objectives[0].points

    @property
    def visited(self) -> Tensor:
        """Every point that was or is being tried. Shape (n, d)."""
        return torch.cat([self.points, self.failed, self.pending])


def signs(study: Study) -> list[float]:
    """+1 for every objective that is maximised, else -1."""
    return [1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in study.directions]


def coordinates(cube: UnitCube, trial: FrozenTrial) -> list[float] | None:
    """Where a trial is, or will be: from its parameters, the sampler's note, or what was enqueued."""
    stored: list[float] | None = trial.system_attrs.get(POINT_ATTRIBUTE)
    return cube.encode(trial.params) or stored or cube.encode(trial.system_attrs.get("fixed_params", {}))


def read_history(study: Study, cube: UnitCube, *, without: int | None = None, with_cut_short: bool = False) -> History:
    """Split the stored trials.

    Args:
        without: Number of the trial that asks.
        with_cut_short: Whether trials count that fitted fewer steps than their points say.
    Raises:
        StorageError: a complete trial of the space has no, or no usable, variance.
    """
    complete: list[FrozenTrial] = []
    points: list[list[float]] = []
    failed: list[list[float]] = []
    pending: list[list[float]] = []
    for trial in study.get_trials(deepcopy=False):
        x = coordinates(cube, trial) if trial.number != without else None
        if x is None or (CUT_ATTRIBUTE in trial.user_attrs and not with_cut_short):
            continue
        if trial.state == TrialState.COMPLETE and all(map(math.isfinite, trial.values)):
            if REPEAT_ATTRIBUTE in trial.user_attrs and x in points:
                continue  # the same answers once more: no second measurement
            complete.append(trial)
            points.append(x)
        elif trial.state == TrialState.FAIL and trial.user_attrs.get("outcome") in CRASHED:
            failed.append(x)
        elif trial.state == TrialState.RUNNING:
            pending.append(x)
    where = _rows(points, cube)
    variances = [objective_variances(trial, len(study.directions)) for trial in complete]
    objectives = [
        _tamed(where, _column([sign * trial.values[i] for trial in complete]), _known([v[i] for v in variances]))
        for i, sign in enumerate(signs(study))
    ]
    return History(
        [trial.number for trial in complete],
        objectives,
        _constraints(complete, where),
        _rows(failed, cube),
        _rows(pending, cube),
        _column([float(trial.user_attrs.get("cost", (0, 0, 0))[2]) for trial in complete]),
    )


def _tamed(points: Tensor, values: Tensor, variances: Tensor | None) -> Quantity:
    """The measurements (larger is better), those of broken models moved to where they say no more than that.

    A perplexity of 10^5 among those near 12 would be the whole scale of a process, and all the others its noise. With q the
    value that a quarter is better than, and s^2 the usual variance of that quarter, what lies below
    q - max(`FAR` (best - q), `VERY_NOISY` s) is put there, with variance s^2. Shares of right answers never lie so far; numbers without noise stay as they are.
    """
    if variances is None or len(values) < FEWEST_TO_TAME:
        return Quantity(points, values, variances)
    quarter = values.quantile(0.75)
    usual = variances[values >= quarter].quantile(0.5)
    floor = quarter - torch.maximum(FAR * (values.max() - quarter), VERY_NOISY * usual.sqrt())
    broken = (values < floor) & (usual > 0)
    return Quantity(points, torch.where(broken, floor, values), torch.where(broken, usual, variances))


def _constraints(complete: list[FrozenTrial], where: Tensor) -> dict[str, Quantity]:
    result = {}
    for name in sorted({name for trial in complete for name in trial.constraints}):
        rows = [i for i, trial in enumerate(complete) if math.isfinite(trial.constraints.get(name, math.nan))]
        values = _column([complete[i].constraints[name] for i in rows])
        variances = _known([_variance(complete[i], f"constraint:{name}") for i in rows])
        result[name] = Quantity(where[rows], values, variances)
    return result


def objective_variances(trial: FrozenTrial, n_objectives: int) -> list[float | None]:
    """Stored noise variance of every objective; None where the trial was imported without.

    Raises:
        StorageError: it has none.
    """
    if n_objectives == 1:
        return [_variance(trial, "value")]
    return [_variance(trial, "values", i, n_objectives) for i in range(n_objectives)]


def _variance(trial: FrozenTrial, key: str, position: int | None = None, length: int = 0) -> float | None:
    noise = trial.user_attrs.get("noise")
    imported = bool(trial.user_attrs.get("imported"))
    found: Any = noise.get(key, None if imported else "nothing") if isinstance(noise, dict) else noise
    if found is None and (imported or noise is not None):
        return None
    if position is not None and isinstance(found, list) and len(found) == length:
        found = found[position]
        if found is None:
            return None
    if isinstance(found, (int, float)) and math.isfinite(found) and found >= 0:
        return float(found)
    raise StorageError(
        f"every complete trial must have a noise variance >= 0 in user_attrs['noise'][{key!r}], "
        f"found noise={noise!r} in trial {trial.number}. Without it lucky trials win; store the squared standard "
        "error, or mark the trial with user_attrs['imported']=true to use the median of the others"
    )


def _known(variances: Sequence[float | None]) -> Tensor | None:
    """Unknown variances become the median of the known ones; None if there are none."""
    known = [v for v in variances if v is not None]
    if not known:
        return None
    median = float(torch.tensor(known, dtype=torch.double).quantile(0.5))
    return _column([median if v is None else v for v in variances])


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def _rows(rows: list[list[float]], cube: UnitCube) -> Tensor:
    return torch.tensor(rows, dtype=torch.double).reshape(len(rows), cube.n_columns)

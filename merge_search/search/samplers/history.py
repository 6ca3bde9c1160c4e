"""The stored trials as tensors.

The search stores with every COMPLETE trial:
    user_attrs["noise"]       {"value": variance}, {"values": [variance, ...]} for several objectives, and
                              {"constraint:NAME": variance} for every constraint: the variance of the stored mean,
                              in its own units squared
    user_attrs["imported"]    true if the trial came without a variance (or with {"value": None})
    user_attrs["fidelity"]    share of the questions asked; 1 where absent
    user_attrs["same_as"]     another trial of the same recipe, whose scores it took
    user_attrs["outcome"]     an `Outcome`; it decides whether a FAIL is evidence against its point
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
"""System attribute: coordinates of a running trial, stored before its first parameter is."""

REPEAT_ATTRIBUTE = "same_as"
"""User attribute: number of the trial of the same recipe whose scores this trial took."""

CRASHED = frozenset(
    {Outcome.NON_FINITE, Outcome.OUT_OF_MEMORY, Outcome.EVALUATOR_ERROR, Outcome.MERGE_ERROR, Outcome.DIED}
)
"""Failures that are evidence against the point. A run that was stopped or lost with its machine is none."""


FAR, VERY_NOISY, FEWEST_TO_TAME = 20.0, 100.0, 4
"""Limits beyond which a value belongs to a broken model (see `_tamed`)."""


@dataclass(frozen=True)
class Quantity:
    """Noisy measurements of one quantity.

    Attributes:
        points: Coordinates (see `UnitCube`). Shape (n, d), float64.
        values: Measured values. Shape (n,), float64, finite.
        variances: Variances of the values' noise. Shape (n,). None if no trial has stored one.
    """

    points: Tensor
    values: Tensor
    variances: Tensor | None


@dataclass(frozen=True)
class History:
    """The trials that belong to the space. Others (baselines, imported points out of bounds) are left out.

    Attributes:
        numbers: Numbers of the complete trials, in order.
        objectives: A quantity per objective, where larger is better, at the points of `numbers`.
        constraints: A quantity per constraint's name, feasible if <= 0, of the trials that measured it.
        failed: Points of crashed trials. Shape (n, d).
        pending: Points of running trials. Shape (n, d).
        questions: Number of questions of each trial of `numbers`, 0 if unknown. Shape (n,), float64.
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
        """Every point that was tried or is being tried. Shape (n, d)."""
        return torch.cat([self.points, self.failed, self.pending])


def signs(study: Study) -> list[float]:
    """+1 for every objective that is maximised, -1 for the others."""
    return [1.0 if direction == StudyDirection.MAXIMIZE else -1.0 for direction in study.directions]


def coordinates(cube: UnitCube, trial: FrozenTrial) -> list[float] | None:
    """A trial's coordinates: of its parameters, the sampler's note or the queued point. None if it has none."""
    stored: list[float] | None = trial.system_attrs.get(POINT_ATTRIBUTE)
    return cube.encode(trial.params) or stored or cube.encode(trial.system_attrs.get("fixed_params", {}))


def read_history(study: Study, cube: UnitCube, *, without: int | None = None, with_cut_short: bool = False) -> History:
    """Read the stored trials, split into complete, failed and running ones.

    Args:
        study: The stored study.
        cube: The space.
        without: Number of a trial to leave out: the one that asks for a point.
        with_cut_short: Whether to include trials that fitted fewer steps than their points ask for.

    Raises:
        StorageError: A complete trial of the space has no usable variance.
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
                continue  # the same answers again are no second measurement
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
    """The measurements (larger is better), with those of broken models moved closer.

    One perplexity of 10^5 among values near 12 would dominate the standardisation and reduce every other difference to
    noise. Let q be the value that a quarter of the trials exceeds, and s^2 the usual variance of that quarter. Values
    below q - max(`FAR` (best - q), `VERY_NOISY` s) are moved to this bound and get the variance s^2. Shares of right
    answers never lie so far away. Values without noise stay as they are.
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
    """Stored noise variance of every objective; None if the trial was imported without one.

    Raises:
        StorageError: A trial that was not imported has none.
    """
    if n_objectives == 1:
        return [_variance(trial, "value")]
    return [_variance(trial, "values", i, n_objectives) for i in range(n_objectives)]


def _variance(trial: FrozenTrial, key: str, position: int | None = None, length: int = 0) -> float | None:
    noise = trial.user_attrs.get("noise")
    imported = bool(trial.user_attrs.get("imported"))
    value: Any = noise.get(key, None if imported else "nothing") if isinstance(noise, dict) else noise
    if value is None and (imported or noise is not None):
        return None
    if position is not None and isinstance(value, list) and len(value) == length:
        value = value[position]
        if value is None:
            return None
    if isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
        return float(value)
    raise StorageError(
        f"every complete trial must have a noise variance >= 0 in user_attrs['noise'][{key!r}], "
        f"found noise={noise!r} in trial {trial.number}. Without it lucky trials win; store the squared standard "
        "error, or mark the trial with user_attrs['imported']=true to use the median of the others"
    )


def _known(variances: Sequence[float | None]) -> Tensor | None:
    """The variances, with the median of the known ones for unknown ones. None if all are unknown."""
    known = [v for v in variances if v is not None]
    if not known:
        return None
    median = float(torch.tensor(known, dtype=torch.double).quantile(0.5))
    return _column([median if v is None else v for v in variances])


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


def _rows(rows: list[list[float]], cube: UnitCube) -> Tensor:
    return torch.tensor(rows, dtype=torch.double).reshape(len(rows), cube.n_columns)

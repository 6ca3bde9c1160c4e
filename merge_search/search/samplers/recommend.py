"""Find the best trial by posterior mean and not by the luckiest measurement.

The best of many noisy values is several points too good, the best posterior mean half a point.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from merge_search.errors import StorageError
from merge_search.search.samplers.history import objective_variances, read_history, signs
from merge_search.search.samplers.kernels import fit, make_kernel
from merge_search.search.samplers.numerics import NUMERICAL_ERRORS, numerics
from merge_search.search.samplers.options import KernelName
from merge_search.search.samplers.unit_cube import UnitCube
from merge_search.seeding import derive_seed
from merge_search.space import Parameter

__all__ = ["Recommendation", "recommend"]

log = logging.getLogger(__name__)

MIN_TRIALS = 3  # fewer measurements cannot predict each other


class Recommendation(NamedTuple):
    """A trial, and the posterior of its noise-free value in the objective's units."""

    number: int
    mean: float
    sd: float


def recommend(
    study: Study, parameters: Mapping[str, Parameter], *, seed: int, kernel: KernelName = "tied"
) -> list[Recommendation]:
    """Feasible trials at full fidelity of a single-objective study, best posterior mean first.

    The Gaussian process of the sampler is fitted to all complete trials of the space, with raced trials at their larger
    variance. These trials keep their measured value and its variance, since nothing else is known of them: trials
    outside the space (base, experts, published presets), trials that share a point but not the recipe (fits that began
    elsewhere), and all trials while there are fewer than three of the space.

    Args:
        study: A study with one objective. `history` says what its trials must hold.
        parameters: Parameters of the search space.
        seed: Seed of the study.
        kernel: Kernel of the sampler.

    Returns:
        Empty if no feasible trial is complete at full fidelity.

    Raises:
        StorageError: The study has several objectives, or a complete trial has no noise variance.

    Determinism: a function of the stored trials and `seed`.
    """
    if len(study.directions) != 1:
        raise StorageError(f"a best trial needs one objective, this study has {len(study.directions)}: use its front")
    trials = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if _is_eligible(t)]
    if not trials:
        return []
    sign = signs(study)[0]
    mean = np.array([t.values[0] for t in trials])
    variance = _variances(trials)
    modelled = _posterior(study, UnitCube(parameters), kernel, derive_seed(seed, "recommend"))
    mixed = _mixed(trials)
    rows = [i for i, t in enumerate(trials) if t.number in modelled.rows and t.number not in mixed]
    picked = [modelled.rows[trials[i].number] for i in rows]
    mean[rows] = sign * modelled.mean[picked]
    variance[rows] = modelled.variance[picked]
    recommendations = [
        Recommendation(t.number, float(m), float(np.sqrt(max(v, 0.0))))
        for t, m, v in zip(trials, mean, variance, strict=True)
    ]
    return sorted(recommendations, key=lambda r: (-sign * r.mean, r.number))


class _Modelled(NamedTuple):
    rows: dict[int, int]  # by trial number
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def _posterior(study: Study, cube: UnitCube, kernel: KernelName, seed: int) -> _Modelled:
    """Posterior of the trials of the space, where larger is better. Empty if there are too few trials for a model."""
    nothing = _Modelled({}, np.zeros(0), np.zeros(0))
    history = read_history(study, cube, with_cut_short=True)
    if len(history.numbers) < MIN_TRIALS or cube.n_columns == 0:
        return nothing
    try:
        with numerics(seed):
            mean, covariance = fit(history.objectives[0], make_kernel(kernel, cube)).posterior(history.points)
    except NUMERICAL_ERRORS as error:
        log.warning("the model failed, recommending by measured values: %s: %s", type(error).__name__, error)
        return nothing
    rows = {number: row for row, number in enumerate(history.numbers)}
    return _Modelled(rows, mean.numpy(), covariance.numpy().diagonal())


def _mixed(trials: Sequence[FrozenTrial]) -> set[int]:
    """Numbers of the trials at points with several recipes, of which the process models the mean only."""
    recipes: dict[str, set[str]] = {}
    for t in trials:
        recipes.setdefault(_point(t), set()).add(t.user_attrs.get("fingerprint", ""))
    return {t.number for t in trials if len(recipes[_point(t)]) > 1}


def _point(trial: FrozenTrial) -> str:
    return repr(sorted(trial.params.items()))


def _is_eligible(trial: FrozenTrial) -> bool:
    is_full = float(trial.user_attrs.get("fidelity", 1.0)) >= 1.0
    is_feasible = all(value <= 0 for value in trial.constraints.values())
    return is_full and is_feasible and bool(np.isfinite(trial.values).all())


def _variances(trials: list[FrozenTrial]) -> NDArray[np.float64]:
    """Noise variances of the measured values. An imported trial without one gets the median of the others."""
    variances = [objective_variances(t, 1)[0] for t in trials]
    known = [v for v in variances if v is not None]
    median = float(np.median(known)) if known else 0.0
    return np.array([median if v is None else v for v in variances])

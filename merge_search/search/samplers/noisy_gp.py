"""`NoisyGPSampler`: the project's own sampler, a Gaussian process with the known noise of every trial.

It differs from Optuna's `GPSampler` in these points. The noise variance of every trial is known; a single inferred one
costs 2 to 16 points of false optimism when trials differ in length. Crashed points are avoided. Coefficients share
their length scale. Candidates are sought near the best trials. Improvement may be counted per question. Trials outside
the space cannot shrink it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from merge_search._compat.optuna import set_system_attribute, set_user_attribute
from merge_search.errors import StudyFileError
from merge_search.search.samplers.acquisition import propose, quasi_random
from merge_search.search.samplers.history import POINT_ATTRIBUTE, History, read_history
from merge_search.search.samplers.numerics import NUMERICAL_ERRORS, numerics
from merge_search.search.samplers.options import BotorchOptions, KernelName, MultiObjective, check_options
from merge_search.search.samplers.recommend import Recommendation, recommend
from merge_search.search.samplers.unit_cube import UnitCube, distributions
from merge_search.seeding import derive_seed
from merge_search.space import Parameter

__all__ = ["FALLBACK_ATTRIBUTE", "NoisyGPSampler", "default_n_startup"]

log = logging.getLogger(__name__)

FALLBACK_ATTRIBUTE = "sampler_fallback"
"""User attribute of a trial whose model failed, with the reason. Its point is quasi-random."""


def default_n_startup(cube: UnitCube) -> int:
    """Number of points before the first model: at least 6, and two more than the largest category has choices."""
    return max(6, 2 + max(cube.n_choices, default=0))


class NoisyGPSampler(BaseSampler):
    """Optuna sampler over a fixed space. `history` says what it reads from trials.

    The first `n_startup` complete trials of the space, queued ones included, are quasi-random. Later suggestions
    maximise a noisy expected improvement. Failed points count as half a trial, so that a space where most points crash
    gets its crash model too.

    Args:
        parameters: Parameters of the search space.
        seed: Seed of the study.
        n_objectives: Unused, since the study has the number.
        n_startup: Number of complete trials before the first model. None: `default_n_startup`.
        kernel: ``tied`` (one length scale per kind of number) or ``plain`` (one per number); see `kernels`.
        multi_objective: ``hypervolume``, ``parego`` or ``auto`` (hypervolume for up to three objectives).
        cost_power: Improvement is divided by the predicted questions to this power. 0 ignores them, 1 counts
            improvement per question. It matters only if trials may fit their coefficients; see `cost`.

    Determinism: bit for bit a function of (seed, trial number, stored trials) on one machine and number of torch
        threads. A lock guards torch's global generator, so suggestions are made one at a time.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        *,
        seed: int,
        n_objectives: int = 1,
        n_startup: int | None = None,
        kernel: KernelName = "tied",
        multi_objective: MultiObjective = "auto",
        cost_power: float = 0.0,
    ) -> None:
        check_options(
            BotorchOptions,
            {"n_startup": n_startup, "kernel": kernel, "multi_objective": multi_objective, "cost_power": cost_power},
        )
        self._cube = UnitCube(parameters)
        self._space = distributions(parameters)
        self._seed = seed
        self._n_startup = default_n_startup(self._cube) if n_startup is None else n_startup
        self._kernel: KernelName = kernel
        self._multi_objective: MultiObjective = multi_objective
        self._cost_power = cost_power
        self._lock = threading.Lock()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The declared space, never one inferred from history."""
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The point of a trial.

        Raises:
            StorageError: A complete trial of the space has no noise variance.
        """
        if self._cube.n_columns == 0:
            return {}
        with self._lock:
            history = read_history(study, self._cube, without=trial.number)
            x = self._point(study, trial, history)
        point = self._cube.decode(x)
        point |= trial.system_attrs.get("fixed_params", {})  # of a trial that was enqueued in part
        # Parameters are stored one by one. From here on, other processes see the whole point as pending.
        noted = self._cube.encode({**_singles(self._space), **point}) or x
        set_system_attribute(study, trial, POINT_ATTRIBUTE, noted)
        return point

    def _point(self, study: Study, trial: FrozenTrial, history: History) -> list[float]:
        start = derive_seed(self._seed, "sampler", "startup")
        if not self._is_started(history):
            return quasi_random(self._cube, seed=start, index=trial.number)
        seed = derive_seed(self._seed, "sampler", trial.number)
        try:
            with numerics(seed):
                return propose(
                    history,
                    self._cube,
                    seed=seed,
                    kernel=self._kernel,
                    multi_objective=self._multi_objective,
                    cost_power=self._cost_power,
                )
        except NUMERICAL_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            log.warning("the model failed at trial %d, trying a quasi-random point instead: %s", trial.number, reason)
            set_user_attribute(study, trial, FALLBACK_ATTRIBUTE, reason)
            return quasi_random(self._cube, seed=start, index=trial.number)

    def _is_started(self, history: History) -> bool:
        complete, failed = len(history.numbers), len(history.failed)
        return complete >= self._n_startup or (complete >= 3 and complete + failed / 2 >= self._n_startup)

    def recommend(self, study: Study) -> list[Recommendation]:
        """Feasible trials at full fidelity, the best posterior mean first (see `recommend.recommend`)."""
        with self._lock:
            return recommend(study, self._cube.parameters, seed=self._seed, kernel=self._kernel)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse a parameter that is not in the space.

        Raises:
            StudyFileError: Always. The search asks for the space's parameters only.
        """
        known = ", ".join(self._space)
        raise StudyFileError(f"parameter {param_name!r} must be one of the search space, which has {known}")

    def reseed_rng(self) -> None:
        """Nothing to do: every trial has its own seed."""

    def after_trial(self, study: Study, trial: FrozenTrial, state: Any, values: Sequence[float] | None) -> None:
        """Nothing to do: the sampler reads everything from the storage."""


def _singles(space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Values of the parameters that have only one."""
    return {
        name: d.choices[0] if hasattr(d, "choices") else d.low  # type: ignore[attr-defined]
        for name, d in space.items()
        if d.single()
    }

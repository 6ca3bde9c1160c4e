"""Optuna's own samplers by name, made safe for studies with baselines, restarts and several drivers.

Optuna's samplers model only the parameters that *all* complete trials share, so one baseline outside the space would
switch them off. After a restart they repeat their first random draws. Here each sampler is made afresh for every draw,
with a seed derived from (study seed, trial number), and sees only the complete trials that belong to the space. No
sampler sees failed trials. ``tpe``, ``gp`` and ``nsga2`` use constraints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from merge_search._compat.optuna import StudyView
from merge_search.errors import StudyFileError
from merge_search.search.samplers.options import check_options, optuna_options
from merge_search.search.samplers.unit_cube import CUT_ATTRIBUTE, distributions, holds
from merge_search.seeding import derive_seed
from merge_search.space import Parameter

__all__ = ["SeededSampler", "StudyOfSpace", "cmaes", "gp", "nsga2", "random", "tpe"]

NSGA2_POPULATION = 20  # Optuna's 50 would be one random generation of most budgets here


class StudyOfSpace(StudyView):
    """The trials of a study that an Optuna sampler can use.

    Left out are finished trials without a valid value for every parameter, trials that fitted fewer steps than their
    points say, and complete trials that lack a constraint which others have. Optuna's Gaussian process refuses to go on
    with the last kind.
    """

    def __init__(self, study: Study, parameters: Mapping[str, Parameter]) -> None:
        super().__init__(study)
        self._parameters = parameters

    def shown(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        finished = (TrialState.COMPLETE, TrialState.PRUNED)
        is_of_space = [t.state not in finished or holds(self._parameters, t.params) for t in trials]
        kept = [t for t, known in zip(trials, is_of_space, strict=True) if known and CUT_ATTRIBUTE not in t.user_attrs]
        constraints = {name for t in kept if t.state == TrialState.COMPLETE for name in t.constraints}
        return [t for t in kept if t.state != TrialState.COMPLETE or constraints <= t.constraints.keys()]


class SeededSampler(BaseSampler):
    """One of Optuna's samplers, made afresh for each draw: a function of (seed, trial number, stored trials).

    Args:
        parameters: Parameters of the search space.
        make: Builds the inner sampler from a seed.
        seed: Seed of the study.
        numeric_only: Whether the inner sampler cannot handle categories. They are then drawn at random.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        make: Callable[[int], BaseSampler],
        *,
        seed: int,
        numeric_only: bool = False,
    ) -> None:
        self._parameters = parameters
        self._make = make
        self._seed = seed
        space = {name: d for name, d in distributions(parameters).items() if not d.single()}
        if numeric_only:
            space = {name: d for name, d in space.items() if not isinstance(d, CategoricalDistribution)}
            space = space if len(space) > 1 else {}  # CMA-ES needs two dimensions
        self._space = space
        self._lock = threading.Lock()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The declared space, never one inferred from history."""
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        with self._lock:
            return self._inner(trial.number).sample_relative(self._view(study), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        with self._lock:
            inner = self._inner(trial.number, param_name)
            return inner.sample_independent(self._view(study), trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Nothing to do: every draw has its own seed."""

    def _inner(self, *names: str | int) -> BaseSampler:
        return self._make(derive_seed(self._seed, "sampler", *names))

    def _view(self, study: Study) -> Study:
        return cast(Study, StudyOfSpace(study, self._parameters))


def _checked(kind: type[BaseSampler], options: Mapping[str, Any]) -> Callable[[int], BaseSampler]:
    """A function that builds `kind` from a seed. It is called once, to find wrong options before the first trial."""
    check_options(optuna_options(kind), options)

    def make(seed: int) -> BaseSampler:
        return kind(seed=seed, **options)  # type: ignore[call-arg]

    try:
        make(0)
    except (TypeError, ValueError) as error:
        raise StudyFileError(f"options of {kind.__name__} must be valid, got {dict(options)}: {error}") from error
    return make


def _one_objective(name: str, n_objectives: int) -> None:
    if n_objectives != 1:
        raise StudyFileError(
            f"sampler {name!r} needs one objective, the study has {n_objectives}: use botorch, gp, tpe or nsga2"
        )


def random(parameters: Mapping[str, Parameter], *, seed: int, n_objectives: int = 1, **options: Any) -> BaseSampler:
    """Independent uniform draws."""
    return SeededSampler(parameters, _checked(optuna.samplers.RandomSampler, options), seed=seed)


def tpe(parameters: Mapping[str, Parameter], *, seed: int, n_objectives: int = 1, **options: Any) -> BaseSampler:
    """Tree-structured Parzen estimator over all parameters jointly. Running trials count as bad ones."""
    make = _checked(optuna.samplers.TPESampler, options)
    return SeededSampler(parameters, make, seed=seed)


def gp(parameters: Mapping[str, Parameter], *, seed: int, n_objectives: int = 1, **options: Any) -> BaseSampler:
    """Optuna's Gaussian process with one inferred noise level."""
    return SeededSampler(parameters, _checked(optuna.samplers.GPSampler, options), seed=seed)


def cmaes(parameters: Mapping[str, Parameter], *, seed: int, n_objectives: int = 1, **options: Any) -> BaseSampler:
    """CMA-ES over the numeric parameters, from the middle of the box. Categories are drawn at random.

    Its state is stored with the trials. It ignores constraints.
    """
    _one_objective("cmaes", n_objectives)
    make = _checked(optuna.samplers.CmaEsSampler, {"warn_independent_sampling": False, **options})
    return SeededSampler(parameters, make, seed=seed, numeric_only=True)


def nsga2(parameters: Mapping[str, Parameter], *, seed: int, n_objectives: int = 1, **options: Any) -> BaseSampler:
    """NSGA-II with populations of 20 unless `population_size` says otherwise."""
    make = _checked(optuna.samplers.NSGAIISampler, {"population_size": NSGA2_POPULATION, **options})
    return SeededSampler(parameters, make, seed=seed)

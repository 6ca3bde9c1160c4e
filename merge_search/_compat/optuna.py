"""Internals of Optuna 5 that have no public counterpart.

Optuna's public setters take a `Trial` that the process asked for itself. Lost trials of another process and trials
inside a sampler are `FrozenTrial`s, whose attributes can only be set through the storage.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

__all__ = ["StudyView", "set_system_attribute", "set_user_attribute", "stored"]


class StudyView:
    """A study as an Optuna sampler should see it: its list of trials is filtered by `shown`, all else is the study's.

    Optuna's samplers read trials through `Study._get_trials` and through the public methods.
    """

    def __init__(self, study: Study) -> None:
        self._study = study

    def shown(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """The trials that the sampler may see, in their order."""
        return trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.get_trials()

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        return self._get_trials(deepcopy, states)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return self.shown(self._study._get_trials(deepcopy=deepcopy, states=states, use_cache=use_cache))


def stored(study: Study, trial: Trial | FrozenTrial) -> FrozenTrial:
    """The trial as the study's storage holds it now."""
    return study._storage.get_trial(trial._trial_id)


def set_user_attribute(study: Study, trial: Trial | FrozenTrial, key: str, value: Any) -> None:
    """Store a user attribute of a trial that is waiting or running."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def set_system_attribute(study: Study, trial: Trial | FrozenTrial, key: str, value: Any) -> None:
    """Store a system attribute of a trial that is waiting or running."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)

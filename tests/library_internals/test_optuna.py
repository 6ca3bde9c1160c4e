"""The internals of Optuna that `_compat.optuna` uses are still there and still do the same."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from merge_search._compat.optuna import StudyView, set_system_attribute, set_user_attribute, stored


def test_attributes_of_a_frozen_trial_reach_the_storage_and_survive_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    study = optuna.create_study(study_name="s", storage=url)
    study.ask()
    (frozen,) = study.get_trials(deepcopy=False)
    set_user_attribute(study, frozen, "outcome", "lost")
    set_system_attribute(study, frozen, "merge_search:point", [0.5])
    (again,) = optuna.load_study(study_name="s", storage=url).trials
    assert again.user_attrs == {"outcome": "lost"}
    assert again.system_attrs["merge_search:point"] == [0.5]


def test_the_stored_trial_is_the_one_that_was_told() -> None:
    study = optuna.create_study()
    trial = study.ask()
    assert stored(study, trial).state == TrialState.RUNNING
    study.tell(trial, 0.25)
    assert stored(study, trial) == study.trials[0]
    assert stored(study, trial).values == [0.25]


class Even(StudyView):
    def shown(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        return [t for t in trials if t.number % 2 == 0]


def test_optunas_samplers_read_their_trials_through_the_view() -> None:
    """TPE with two startup trials draws at random until it sees two of them."""
    study = optuna.create_study()
    for value in range(3):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        study.tell(trial, value)
    view = Even(study)
    assert [t.number for t in view.trials] == [0, 2]
    assert view.study_name == study.study_name
    seen: list[int] = []

    class Counted(Even):
        def shown(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
            seen.append(len(trials))
            return super().shown(trials)

    sampler = optuna.samplers.TPESampler(n_startup_trials=2, seed=0)
    asking = stored(study, study.ask())
    sampler.sample_independent(Counted(study), asking, "x", FloatDistribution(0, 1))  # type: ignore[arg-type]
    assert seen, "the sampler did not ask the view for its trials"

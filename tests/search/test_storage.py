"""What a killed driver leaves is reclaimed; a changed study is refused; one driver at a time."""

from __future__ import annotations

import multiprocessing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from merge_search.errors import StorageError, StudyChangedError
from merge_search.outcome import Outcome
from merge_search.search.budget import seconds_spent
from merge_search.search.process_record import PROCESS, this_process
from merge_search.search.records import finished_records
from merge_search.search.storage import (
    INTERRUPTED,
    MOST_LOST,
    check_identity,
    describe_changes,
    driver_lock,
    mark_interrupted,
    open_storage,
    reclaim_lost_trials,
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def study_in(url: str) -> optuna.Study:
    return optuna.create_study(study_name="s", storage=open_storage(url), direction="maximize", load_if_exists=True)


def test_sqlite_keeps_a_write_ahead_log(url: str) -> None:
    study = study_in(url)
    study.tell(study.ask(), 1.0)
    with study._storage._backend.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_lost_trial_is_closed_and_its_point_tried_again(url: str) -> None:
    study = study_in(url)
    trial = study.ask()
    x = trial.suggest_float("x", 0, 1)
    assert len(reclaim_lost_trials(study)) == 1
    again = study.ask()
    assert again.suggest_float("x", 0, 1) == x
    assert again.user_attrs["retry_of"] == trial.number
    study.tell(again, 0.5)
    assert study.trials[0].user_attrs["outcome"] == Outcome.LOST
    assert study.trials[0].state == TrialState.FAIL
    assert reclaim_lost_trials(study) == []


def test_a_point_that_is_lost_twice_still_names_its_first_try(url: str) -> None:
    study = study_in(url)
    study.ask().suggest_float("x", 0, 1)
    for _ in range(2):
        assert len(reclaim_lost_trials(study)) == 1
        again = study.ask()
        assert again.user_attrs["retry_of"] == 0
        again.suggest_float("x", 0, 1)


@pytest.mark.parametrize("step", ["enqueue_trial", "tell"])
def test_a_kill_while_a_lost_trial_is_reclaimed_neither_loses_nor_doubles_its_point(url: str, step: str) -> None:
    study = study_in(url)
    x = study.ask().suggest_float("x", 0, 1)
    with mock.patch.object(study, step, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        reclaim_lost_trials(study)
    assert len(reclaim_lost_trials(study)) == 1
    (waiting,) = study.get_trials(states=(TrialState.WAITING,))
    assert waiting.system_attrs["fixed_params"] == {"x": x}
    assert not study.get_trials(states=(TrialState.RUNNING,))


def test_a_lost_baseline_keeps_its_recipe_and_label(url: str) -> None:
    study = study_in(url)
    study.enqueue_trial({}, user_attrs={"label": "average", "given_recipe": "{}"})
    study.ask()
    reclaim_lost_trials(study)
    again = study.ask()
    assert (again.user_attrs["label"], again.user_attrs["given_recipe"]) == ("average", "{}")


def test_a_queued_point_of_which_a_part_was_stored_comes_back_whole(url: str) -> None:
    study = study_in(url)
    study.enqueue_trial({"x": 0.25, "y": 0.75}, user_attrs={"label": "task_arithmetic"})
    study.ask().suggest_float("x", 0, 1)
    reclaim_lost_trials(study)
    again = study.ask()
    assert (again.suggest_float("x", 0, 1), again.suggest_float("y", 0, 1)) == (0.25, 0.75)
    assert again.user_attrs["label"] == "task_arithmetic"


def lose(study: optuna.Study, **ended: Any) -> list[str]:
    """Begin a trial in a process with the given record, and reclaim it."""
    trial = study.ask()
    trial.set_user_attr(PROCESS, {**this_process(), **ended})
    trial.suggest_float("x", 0, 1)
    return reclaim_lost_trials(study)


def test_a_point_in_which_the_process_dies_three_times_is_given_up(url: str) -> None:
    study = study_in(url)
    for _ in range(3):
        said = lose(study)
    assert said == [f"trial 2 of a killed run is given up: {study.trials[2].user_attrs['reason']}"]
    assert [t.user_attrs["outcome"] for t in study.trials] == [Outcome.LOST, Outcome.LOST, Outcome.DIED]
    assert [r.number for r in finished_records(study)] == [2]


def test_a_point_that_the_user_interrupts_is_never_given_up(url: str) -> None:
    study = study_in(url)
    for _ in range(5):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr(INTERRUPTED, True)
        reclaim_lost_trials(study)
    assert {t.user_attrs["outcome"] for t in study.trials[:5]} == {Outcome.LOST}
    assert study.trials[5].state == TrialState.WAITING


def test_three_machines_that_went_away_are_no_evidence_against_a_point(url: str) -> None:
    study = study_in(url)
    for n in range(3):
        said = lose(study, boot=f"machine {n}")
    assert said == ["trial 2 of a killed run is closed, and its point queued again"]
    assert {t.user_attrs["outcome"] for t in study.trials[:3]} == {Outcome.LOST}
    (waiting,) = study.get_trials(states=(TrialState.WAITING,))
    assert waiting.system_attrs["fixed_params"] == study.trials[0].params
    lose(study), lose(study)
    assert study.trials[4].user_attrs["outcome"] == Outcome.LOST, "two crashes among five ends"
    lose(study)
    assert study.trials[5].user_attrs["outcome"] == Outcome.DIED


def test_a_point_whose_machine_always_goes_away_is_given_up_without_blame(url: str) -> None:
    study = study_in(url)
    for n in range(MOST_LOST):
        said = lose(study, boot=f"machine {n}")
    (text,) = said
    assert f"{MOST_LOST} processes ended in it" in text
    assert not study.get_trials(states=(TrialState.WAITING,))
    assert {t.user_attrs["outcome"] for t in study.trials} == {Outcome.LOST}
    assert finished_records(study) == []


def test_all_running_trials_are_marked_when_a_run_is_stopped(url: str) -> None:
    study = study_in(url)
    study.tell(study.ask(), 0.5)
    study.ask(), study.ask()
    mark_interrupted(study)
    assert [INTERRUPTED in t.user_attrs for t in study.trials] == [False, True, True]


def test_what_a_lost_trial_had_charged_counts_as_time_spent(url: str) -> None:
    study = study_in(url)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("cost", [1.5, 2.0, 300])
    reclaim_lost_trials(study)
    assert seconds_spent(study) == 3.5


def test_lost_trials_do_not_count_towards_the_budget(url: str) -> None:
    study = study_in(url)
    study.ask()
    reclaim_lost_trials(study)
    trial = study.ask()
    trial.set_user_attr("outcome", "ok")
    study.tell(trial, 1.0)
    assert [r.number for r in finished_records(study)] == [1]


def test_the_night_between_a_kill_and_the_next_run_is_not_charged(url: str) -> None:
    """Base and experts are: they are scored outside trials."""
    study, now = study_in(url), datetime(2026, 1, 1)
    for outcome, hours in (("ok", 1), ("lost", 9)):
        trial = create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs={"outcome": outcome})
        trial.datetime_start, trial.datetime_complete = now, now + timedelta(hours=hours)
        study._storage.create_new_trial(study._study_id, template_trial=trial)
    study.set_user_attr("reference.base", {"evaluation": {"cost": [60.0, 540.0, 100]}})
    assert seconds_spent(study) == 3600 + 600


def test_a_changed_study_is_refused_with_the_difference(url: str) -> None:
    study = study_in(url)
    check_identity(study, {"models": {"base": "abc", "maths": "def"}, "seed": 0})
    check_identity(study, {"models": {"base": "abc", "maths": "def"}, "seed": 0})
    with pytest.raises(StudyChangedError, match=r"models\.maths: was 'def', is now 'xyz'\n  - seed: was 0, is now 1"):
        check_identity(study, {"models": {"base": "abc", "maths": "xyz"}, "seed": 1})


def test_differences_are_described_wherever_they_are() -> None:
    assert describe_changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == [
        "a.c: was 2, is now absent",
        "a.d: is new: 3",
    ]


def _hold(url: str, ready: object, release: object) -> None:
    with driver_lock(open_storage(url), url, "s"):
        ready.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_a_second_driver_is_refused_until_the_first_is_gone(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(url, ready, release))
    first.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(StorageError, match=f"being run by another process.*process {first.pid}"),
            driver_lock(open_storage(url), url, "s"),
        ):
            pass
        first.kill()
        first.join()
        with driver_lock(open_storage(url), url, "s"):
            pass
    finally:
        first.kill()


def test_an_unreachable_storage_is_named_without_its_password() -> None:
    with pytest.raises(StorageError) as caught:
        open_storage("postgresql://someone:secret@localhost:1/none")
    assert "secret" not in str(caught.value)


def test_a_damaged_database_is_one_sentence_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"not a database" * 300)
    with pytest.raises(StorageError) as caught:
        open_storage(f"sqlite:///{tmp_path / 's.db'}")
    text = str(caught.value)
    assert text.startswith(
        f"storage 'sqlite:///{tmp_path / 's.db'}' cannot be opened: file is not a database; see that"
    )
    assert text.count("\n") == 0
    assert "SELECT" not in text
    assert "PRAGMA" not in text


def test_a_database_without_a_lock_of_its_own_is_refused() -> None:
    storage = open_storage("sqlite://")
    with (
        pytest.raises(StorageError, match="must be sqlite:///FILE or PostgreSQL"),
        driver_lock(storage, "sqlite://", "s"),
    ):
        pass

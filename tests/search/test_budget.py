"""What a study has spent, what its budget still pays for, and what a budget in questions leaves to the search."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from merge_search.evaluation import Cost, Evaluation, Scores, Split
from merge_search.search.budget import (
    ASKED_IN_VAIN,
    LEAST_QUESTIONS,
    START_SCORE,
    Budget,
    affordable_steps,
    planned_fidelity,
    questions_asked,
    questions_of_a_trial,
    seconds_spent,
)
from merge_search.study_file import Search

TASKS = {"a": 200, "b": 400}
NOON = datetime(2026, 1, 1, 12)


def scored(seconds: tuple[float, float], questions: int) -> dict[str, Any]:
    scores = {"t/acc": Scores((), np.zeros(2), 0.0, 0.1)}
    return {"evaluation": Evaluation(Split.SEARCH, 1.0, scores, Cost(*seconds, questions)).to_attribute()}


@pytest.fixture
def study() -> optuna.Study:
    """Base and one expert with 100 questions each, and trials of 30 + 40 questions. Every trial took ten seconds."""
    study = optuna.create_study()
    study.set_user_attr("reference.base", scored((1.0, 2.0), 100))
    study.set_user_attr("reference.maths", scored((4.0, 8.0), 100))
    for attributes in (
        {"label": "base", "cost": [1.0, 2.0, 100]},
        {"label": "maths", "cost": [4.0, 8.0, 100]},
        {"label": "ties", "cost": [0.5, 0.5, 30]},
        {"cost": [0.5, 0.5, 40]},
        {},
    ):
        add(study, attributes)
    return study


def add(study: optuna.Study, attributes: Mapping[str, Any], seconds: float = 10.0) -> None:
    trial = create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs=dict(attributes))
    trial.datetime_start, trial.datetime_complete = NOON, NOON + timedelta(seconds=seconds)
    study._storage.create_new_trial(study._study_id, template_trial=trial)


def test_questions_of_base_and_experts_count_once_and_those_asked_in_vain_count(study: optuna.Study) -> None:
    assert questions_asked(study) == 100 + 100 + 30 + 40
    study.set_user_attr(ASKED_IN_VAIN, 7)
    study.set_user_attr(START_SCORE, scored((16.0, 32.0), 5))
    assert questions_asked(study) == 270 + 7 + 5
    assert questions_of_a_trial(study) == 100


def test_seconds_of_base_and_experts_are_those_of_their_scoring(study: optuna.Study) -> None:
    assert seconds_spent(study) == 5 * 10 + 1 + 2 + 4 + 8
    study.set_user_attr(START_SCORE, scored((16.0, 32.0), 5))
    assert seconds_spent(study) == 65 + 48


@pytest.mark.parametrize("outcome", ["lost", "died"])
def test_a_trial_whose_process_ended_counts_with_what_it_had_charged(study: optuna.Study, outcome: str) -> None:
    before = seconds_spent(study)
    add(study, {"outcome": outcome, "cost": [1.5, 2.0, 300]}, seconds=86_400)
    assert seconds_spent(study) == before + 3.5
    add(study, {"outcome": outcome}, seconds=86_400)
    assert seconds_spent(study) == before + 3.5


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({}, ""),
        ({"questions": 271}, ""),
        ({"questions": 270}, "270 of 270 questions are asked: the search ends here"),
        ({"hours": 66 / 3600}, ""),
        ({"hours": 65 / 3600}, "0.02 of 0.0180556 hours are used: the search ends here"),
        ({"questions": 200, "hours": 0.01}, "270 of 200 questions are asked: the search ends here"),
    ],
)
def test_a_search_ends_once_its_questions_or_its_hours_are_used(
    study: optuna.Study, limits: Mapping[str, Any], wanted: str
) -> None:
    assert Budget(Search(**limits), study).used_up() == wanted


def test_a_fit_may_ask_what_is_left_without_the_questions_of_its_scoring(study: optuna.Study) -> None:
    assert Budget(Search(), study).questions_left() is None
    assert Budget(Search(questions=1000), study).questions_left() == 1000 - 270 - 100
    assert Budget(Search(questions=300), study).questions_left() == -70


@pytest.mark.parametrize(("questions", "steps"), [(14, 0), (15, 1), (24, 1), (25, 2), (54, 4), (55, 5), (1000, 5)])
def test_the_steps_that_a_budget_pays_for_are_at_most_those_of_the_settings(questions: int, steps: int) -> None:
    """Five questions before the first step and ten for each."""
    settings = {"steps": 5, "per": "tensor"}
    asked: list[Mapping[str, Any]] = []

    def price(chosen: Mapping[str, Any]) -> int:
        asked.append(chosen)
        return 5 + 10 * int(chosen["steps"])

    assert affordable_steps(settings, questions, price) == steps
    assert {chosen["per"] for chosen in asked} == {"tensor"}


def test_without_a_budget_every_trial_is_asked_all_questions() -> None:
    assert planned_fidelity(Search(), TASKS, 8) == 1


def test_a_share_in_the_file_is_taken_as_it_is() -> None:
    assert planned_fidelity(Search(fidelity=0.9, questions=10), TASKS, 8) == 0.9


def test_first_trials_ask_a_third_of_the_budget() -> None:
    share = planned_fidelity(Search(questions=7200), TASKS, 8)
    assert share == pytest.approx(0.5)
    assert 8 * share * 600 == pytest.approx(7200 / 3)
    assert planned_fidelity(Search(questions=100_000), TASKS, 8) == 1


def test_the_smallest_task_keeps_enough_questions_to_be_judged() -> None:
    assert planned_fidelity(Search(questions=500), TASKS, 8) == LEAST_QUESTIONS / 200
    assert planned_fidelity(Search(questions=500), {"a": 20, "b": 400}, 8) == 1
    assert planned_fidelity(Search(questions=500), {}, 8) == 1

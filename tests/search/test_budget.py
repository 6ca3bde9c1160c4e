"""What a budget in questions leaves to the search."""

from __future__ import annotations

import pytest

from merge_search.search.budget import LEAST_QUESTIONS, planned_fidelity
from merge_search.study_file import Search

TASKS = {"a": 200, "b": 400}


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

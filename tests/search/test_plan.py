"""A study that goes on keeps the meaning of its numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from merge_search.evaluation import MetricInfo, Split
from merge_search.objective import Objective
from merge_search.search.plan import Plan
from merge_search.study_file import StudyFile

METRICS = [MetricInfo("a", "acc", True, {Split.SEARCH: 10})]
BEFORE = {"maximise": ["mean_retention"], "minimise": [], "constraints": []}
"""The objective in the identity of a study that began before leads, weights and guards existed."""


def plan(
    *,
    options: dict[str, Any] | None = None,
    search: dict[str, Any] | None = None,
    fidelity: float = 1.0,
    **objective: Any,
) -> Plan:
    data: dict[str, Any] = {"study": {"name": "s"}, "models": {"base": "b", "experts": {"x": "x"}}}
    data |= {"evaluate": [{"evaluator": "e", **(options or {})}], "search": search or {}}
    file = StudyFile.model_validate({**data, "objective": {"maximise": "mean_retention", **objective}})
    unused: Any = None
    evaluator: Any = SimpleNamespace(fingerprint=lambda: "the same questions")
    found = Objective.from_settings(file.objective.settings, METRICS)
    return Plan(file, unused, unused, [evaluator], METRICS, found, [], fidelity=fidelity)


def test_a_study_from_before_leads_counts_every_task_as_it_did() -> None:
    resumed = plan().resuming({"objective": BEFORE})
    assert resumed.objective.lead == 0
    assert resumed.identity({})["objective"] == BEFORE
    assert plan(lead=0).identity({})["objective"] == BEFORE


@pytest.mark.parametrize("stored", [None, {"objective": {**BEFORE, "lead": 2.0}}])
def test_other_studies_have_the_rule(stored: Any) -> None:
    assert plan().resuming(stored).objective.lead == 2.0
    assert plan().resuming(stored).identity({})["objective"] == {**BEFORE, "lead": 2.0}


def test_a_lead_in_the_study_file_is_no_secret_change() -> None:
    """The identities differ, so the run is refused."""
    assert plan(lead=3).resuming({"objective": BEFORE}).identity({})["objective"] != BEFORE


def test_weights_and_guard_are_part_of_the_identity() -> None:
    found = plan(weights={"a": 2}, guard=0.01)
    assert found.identity({})["objective"] == {**BEFORE, "lead": 2.0, "weights": {"a": 2.0}, "guard": 0.01}
    assert (found.objective.task_weights, found.objective.guard) == ({"a": 2.0}, 0.01)


def test_a_study_whose_groups_stand_for_their_tasks_keeps_its_identity() -> None:
    assert plan(options={"groups": "each"}).identity({}) == plan().identity({})
    assert plan(options={"groups": "one"}).identity({}) != plan().identity({})


def test_a_study_goes_on_with_the_share_of_the_questions_that_it_began_with() -> None:
    """Its budget may have grown, or its release had no plan yet: answers stay comparable."""
    for before in (0.25, 1.0):
        resumed = plan(search={"questions": 500}, fidelity=0.5).resuming({"objective": BEFORE, "fidelity": before})
        assert resumed.identity({})["fidelity"] == resumed.fidelity == before
    given = plan(search={"fidelity": 0.5}, fidelity=0.5).resuming({"objective": BEFORE, "fidelity": 0.25})
    assert given.fidelity == 0.5  # the identities differ, so the run is refused


def test_the_share_that_the_budget_pays_for_is_said_unless_the_file_gives_it() -> None:
    (note,) = plan(search={"questions": 500}, fidelity=0.25).notes
    assert "pays for 25% of the search questions in every trial" in note
    assert plan(search={"questions": 500, "fidelity": 0.25}, fidelity=0.25).notes == []
    assert plan().notes == []

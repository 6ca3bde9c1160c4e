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


def plan(*, options: dict[str, Any] | None = None, **objective: Any) -> Plan:
    data: dict[str, Any] = {"study": {"name": "s"}, "models": {"base": "b", "experts": {"x": "x"}}}
    data |= {"evaluate": [{"evaluator": "e", **(options or {})}]}
    file = StudyFile.model_validate({**data, "objective": {"maximise": "mean_retention", **objective}})
    unused: Any = None
    evaluator: Any = SimpleNamespace(fingerprint=lambda: "the same questions")
    found = Objective.from_settings(file.objective.settings, METRICS)
    return Plan(file, unused, unused, [evaluator], METRICS, found, [])


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

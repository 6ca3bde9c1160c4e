"""A search that cannot work is refused or warned of, with the number that would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from merge_search.errors import StudyFileError
from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Objective, References
from merge_search.outcome import Outcome
from merge_search.search.checks import MAX_DIMENSIONS, budget_notes, constraint_notes, search_problems
from merge_search.search.prepare import prepare
from merge_search.search.records import Record
from merge_search.space import Float, Parameter
from merge_search.study_file import Search, read_study_file

METRICS = [MetricInfo(t, "acc", True, {Split.SEARCH: 100}) for t in ("a", "b")]
ONE = Objective(["mean"], [], [], METRICS)


def space(n: int) -> dict[str, Parameter]:
    return {f"x{i}": Float(0, 1) for i in range(n)}


def test_a_space_must_vary_and_be_searchable() -> None:
    assert search_problems(Search(), space(1), ONE) == []
    assert "needs at least 1" in search_problems(Search(), space(0), ONE)[0]
    found = search_problems(Search(), space(100_000), ONE)
    assert f"100000 dimensions, and at most {MAX_DIMENSIONS}" in found[0]


def test_the_stop_rule_needs_one_objective() -> None:
    two = Objective(["a", "b"], [], [], METRICS)
    search = Search.model_validate({"stop": {}})
    assert search_problems(search, space(1), ONE) == []
    assert "needs one objective, found 2 (a, b)" in search_problems(search, space(1), two)[0]


def test_too_few_trials_for_the_start_are_said_with_the_number_that_would_do() -> None:
    assert budget_notes(10, 11) == []
    assert "At least 11" in budget_notes(10, 10)[0]


def scores(a: int, b: int) -> Evaluation:
    def of(n: int) -> Scores:
        v = np.array([1.0] * n + [0.0] * (100 - n))
        return Scores((), v, n / 100, 0.04)

    return Evaluation(Split.SEARCH, 1.0, {"a/acc": of(a), "b/acc": of(b)})


def notes(*constraints: str) -> list[str]:
    """Base (50, 50), experts x (90, 40) and y (40, 90), average (70, 70)."""
    objective = Objective(["mean"], [], constraints, METRICS)
    table = {"base": scores(50, 50), "x": scores(90, 40), "y": scores(40, 90), "average": scores(70, 70)}
    references = References.from_evaluations(METRICS, table["base"], {"x": table["x"], "y": table["y"]})
    records = []
    for i, (label, evaluation) in enumerate(table.items()):
        attributes: dict[str, Any] = {"evaluation": evaluation.to_attribute()}
        ok = all(v.value <= 0 for v in objective.violations(evaluation, references).values())
        records.append(Record(i, label, Outcome.OK, "", (0.5,), ok, attributes))
    return constraint_notes(records, objective, references)


def test_constraints_that_a_baseline_meets_are_not_mentioned() -> None:
    assert notes() == []
    assert notes("a >= base - 0.01", "b >= expert - 0.25") == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a >= 0.95", "a >= 0.9"),
        ("a >= base + 0.45", "a >= base + 0.4"),
        ("b >= expert + 0.05", "b >= expert + 0"),
        ("b <= base - 0.2", "b <= base - 0.1"),
    ],
)
def test_a_constraint_that_no_baseline_meets_comes_with_the_number_that_would_do(text: str, number: str) -> None:
    (note,) = notes(text)
    assert "met by none of the 4 baselines" in note
    assert f"'{number}' would already hold" in note


def test_constraints_that_fail_only_together_are_said() -> None:
    (note,) = notes("a >= 0.8", "b >= 0.8")
    assert "no baseline meets all 2 constraints at once; average comes nearest" in note
    assert "a >= 0.8 by 0.1, b >= 0.8 by 0.1" in note


def refused(folder: Path, demo: Path, **changes: Any) -> str:
    """What a study of drift alone is refused with, before any weight."""
    data: dict[str, Any] = {
        "study": {"name": "n"},
        "models": {"base": str(demo / "models" / "base"), "experts": {"maths": str(demo / "models" / "maths")}},
        "space": {"type": "uniform", "presets": ["task_arithmetic"]},
        "evaluate": [
            {
                "evaluator": "drift",
                "include_path": str(demo / "tasks"),
                "texts": "demo_maths/train.jsonl",
                "key": "query",
            }
        ],
        "objective": {"minimise": "drift/kl"},
        "device": "cpu",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    with pytest.raises(StudyFileError) as caught:
        prepare(read_study_file(path))
    return str(caught.value)


def test_a_learner_is_refused_where_no_evaluator_has_a_gradient(demo: Path, tmp_path: Path) -> None:
    assert "no evaluator of this study has a differentiable loss" in refused(tmp_path, demo, search={"learner": {}})


def test_a_users_own_space_is_held_to_the_same_sizes(demo: Path, tmp_path: Path) -> None:
    source = (
        "from merge_search.space import Float\n"
        "class Mine:\n"
        "    def __init__(self, options, context):\n"
        "        self.parameters = {f'x{i}': Float(0, 1) for i in range(options['n'])}\n"
    )
    (tmp_path / "mine.py").write_text(source)
    assert "0 dimensions" in refused(tmp_path, demo, space={"type": "mine.py:Mine", "n": 0})
    assert "5000 dimensions" in refused(tmp_path, demo, space={"type": "mine.py:Mine", "n": 5000})


def test_retention_of_costs_alone_is_refused(demo: Path, tmp_path: Path) -> None:
    assert "found only costs" in refused(tmp_path, demo, objective={"maximise": "mean_retention"})


def test_every_look_of_a_race_must_ask_something_new() -> None:
    few = [MetricInfo("a", "acc", True, {Split.SEARCH: 4}), MetricInfo("b", "acc", True, {Split.SEARCH: 40})]
    search = Search.model_validate({"racing": {"looks": [0.25, 0.5]}})
    (found,) = search_problems(search, space(1), Objective(["mean"], [], [], few))
    assert "found [2, 2], at last 4, of the 4 search questions of 'a/acc'" in found
    assert search_problems(search, space(1), ONE) == []


def test_an_expert_cannot_be_called_like_a_baseline(demo: Path, tmp_path: Path) -> None:
    """Baselines are told apart by their names: its scores would pass for those of the baseline."""
    path = tmp_path / "study.yaml"
    task = {"evaluator": "lm_eval", "tasks": ["demo_maths"], "include_path": str(demo / "tasks"), "limit": 40}
    experts = {"ties": str(demo / "models" / "maths"), "stories": str(demo / "models" / "stories")}
    data = {
        "study": {"name": "s"},
        "models": {"base": str(demo / "models" / "base"), "experts": experts},
        "evaluate": [task],
    }
    path.write_text(yaml.safe_dump({**data, "search": {"baselines": ["ties"]}}))
    with pytest.raises(StudyFileError, match="'ties' is the name of a baseline"):
        prepare(read_study_file(path))
    path.write_text(yaml.safe_dump({**data, "search": {"baselines": []}}))
    assert prepare(read_study_file(path)).context.experts == ("stories", "ties")

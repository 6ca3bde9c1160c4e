"""The finalists, the winner and the verdict, on studies whose numbers are made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Objective, References
from merge_search.report.table import summary_table
from merge_search.search import selection
from merge_search.search.storage import open_storage
from merge_search.space import Float

METRIC = MetricInfo("t", "acc", True, {Split.SEARCH: 100, Split.VALIDATION: 100})
OBJECTIVE = Objective(["t"], [], [], [METRIC])


def evaluation(correct: int, n: int = 100) -> dict[str, Any]:
    v = np.array([1.0] * correct + [0.0] * (n - correct))
    score = Scores((), v, float(v.mean()), float(v.std(ddof=1) / n**0.5))
    return Evaluation(Split.SEARCH, 1.0, {"t/acc": score}).to_attribute()


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """Base 50, expert 60, average 65, then searched trials 70, 80, 75; the 80 was luck."""
    storage = open_storage(f"sqlite:///{tmp_path / 's.db'}")
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    rows = [("base", 50, 50), ("x", 60, 60), ("average", 65, 66), ("", 70, 71), ("", 80, 64), ("", 75, 74)]
    validation = {}
    for i, (label, search, later) in enumerate(rows):
        trial = study.ask()
        trial.suggest_float("c", 0, 1) if not label else None
        trial.set_user_attr("label", label) if label else None
        trial.set_user_attr("evaluation", evaluation(search))
        trial.set_user_attr("recipe", '{"format":1,"models":{"base":"b","experts":[["x","e"]]},"preset":"ties"}')
        trial.set_user_attr("noise", {"value": 0.002})
        trial.set_user_attr("outcome", "ok")
        study.tell(trial, search / 100)
        validation[str(i)] = evaluation(later)
    for label, correct in (("base", 50), ("x", 60)):
        study.set_user_attr(f"reference.{label}", {"evaluation": evaluation(correct)})
    study.set_user_attr("validation", validation)
    return study


def test_the_progress_line_names_the_best_merge_not_the_best_expert(study: optuna.Study) -> None:
    best = selection.best(study, OBJECTIVE)
    assert best is not None
    assert best.number == 4


def test_the_winner_is_best_on_validation_not_the_luckiest(study: optuna.Study) -> None:
    winner = selection.winner(study, OBJECTIVE, ("x",))
    assert winner is not None
    assert winner.number == 5


def test_finalists_are_searched_merges(study: optuna.Study) -> None:
    found = selection.finalists(study, OBJECTIVE, {"c": Float(0, 1)}, seed=0, n=2)
    assert len(found) == 2
    assert {r.number for r in found} <= {3, 4, 5}


def test_rows_are_ordered_by_role_then_score(study: optuna.Study) -> None:
    rows = selection.standings(study, OBJECTIVE, ("x",))
    assert [(r.role, r.record.number) for r in rows] == [
        ("base", 0), ("expert", 1), ("baseline", 2), ("merge", 5), ("merge", 3), ("merge", 4)
    ]  # fmt: skip


def test_a_baseline_can_win(study: optuna.Study) -> None:
    scores = dict(study.user_attrs["validation"])
    scores["2"] = evaluation(90)
    study.set_user_attr("validation", scores)
    winner = selection.winner(study, OBJECTIVE, ("x",))
    assert winner is not None
    assert winner.label == "average"
    assert "worse than baseline: average" in summary_table(study, OBJECTIVE, ("x",)).verdict


def test_the_verdict_is_a_paired_interval(study: optuna.Study) -> None:
    """74 against 66 of the same 100 questions, nested: 8 questions differ, all in favour."""
    d = np.array([1.0] * 8 + [0.0] * 92)
    half = 1.96 * float(d.std(ddof=1)) / 10
    verdict = summary_table(study, OBJECTIVE, ("x",)).verdict
    assert "better than baseline: average" in verdict
    assert f"mean score +0.080, 95 % interval [{0.08 - half:+.3f}, {0.08 + half:+.3f}]" in verdict


def test_the_sealed_test_compares_base_experts_average_and_the_winner(study: optuna.Study) -> None:
    study.set_user_attr("test_winner", 5)
    assert [r.number for r in selection.compared(study, OBJECTIVE)] == [0, 1, 2, 5]


def test_retention_of_a_row_uses_the_references_of_its_own_split(study: optuna.Study) -> None:
    objective = Objective(["mean_retention"], [], [], [METRIC])
    row = next(r for r in selection.standings(study, objective, ("x",)) if r.record.number == 5)
    assert row.values[0] == pytest.approx((0.74 - 0.50) / (0.60 - 0.50))


def test_linear_objectives_have_weights_and_others_have_none() -> None:
    references = References({"t/acc": 0.5}, {"t/acc": 0.75}, {"t/acc": "x"}, 1.0)
    assert Objective(["mean_retention"], [], [], [METRIC]).weights(references) == {"t/acc": 4.0}
    assert Objective([], ["t"], [], [METRIC]).weights(references) == {"t/acc": -1.0}
    assert Objective(["worst_retention"], [], [], [METRIC]).weights(references) is None

"""The finalists, the winner and the verdict, on studies whose numbers are made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from scipy import stats

from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Estimate, Objective, References
from merge_search.recipe import Recipe
from merge_search.report.model_card import card
from merge_search.report.table import front_table, sealed_table, summary_table, trials_table
from merge_search.search.records import best, candidates, records, references_of
from merge_search.search.storage import open_storage
from merge_search.search.verdict import selection
from merge_search.search.verdict.validation import to_validate, validate
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
    incumbent = best(study, OBJECTIVE)
    assert incumbent is not None
    assert incumbent.number == 4


def test_the_winner_is_best_on_validation_not_the_luckiest(study: optuna.Study) -> None:
    winner = selection.winner(study, OBJECTIVE, ("x",))
    assert winner is not None
    assert winner.number == 5


def test_finalists_are_searched_merges(study: optuna.Study) -> None:
    found = selection.finalists(study, OBJECTIVE, {"c": Float(0, 1)}, seed=0, n=2)
    assert len(found) == 2
    assert {r.number for r in found} <= {3, 4, 5}
    everything = selection.finalists(study, OBJECTIVE, {"c": Float(0, 1)}, seed=0, n=10)
    assert {r.number for r in everything} == {3, 4, 5}  # the average is compared besides


def test_rows_are_ordered_by_role_then_score(study: optuna.Study) -> None:
    rows = selection.standings(study, OBJECTIVE, ("x",))
    assert [(r.role, r.record.number) for r in rows] == [
        ("base", 0), ("expert", 1), ("baseline", 2), ("merge", 5), ("merge", 3), ("merge", 4)
    ]  # fmt: skip


def test_a_merge_that_is_lucky_on_validation_alone_does_not_win(study: optuna.Study) -> None:
    """The search's own error equals that of a score of 74 here, so trial 5 lies halfway: (0.74 + m + shift) / 2.

    Validation is 0.01 harder for the baselines: shift = mean(0.50 - 0.51, 0.60 - 0.61, 0.66 - 0.67). Trial 5 is
    expected at (0.74 + 0.69) / 2 = 0.715, trial 3 at about (0.71 + 0.77) / 2 = 0.74.
    """
    error = next(s for s in selection.standings(study, OBJECTIVE, ("x",)) if s.record.number == 5).stderrs[0]
    means = {"0": 0.51, "1": 0.61, "2": 0.67, "3": 0.78, "5": 0.70}
    study.set_user_attr(selection.POSTERIOR_ATTRIBUTE, {k: [m, error] for k, m in means.items()})
    rows = {s.record.number: s for s in selection.standings(study, OBJECTIVE, ("x",))}
    assert rows[5].expected == pytest.approx(0.715)
    assert rows[3].expected == pytest.approx(0.74, abs=0.001)
    assert rows[4].expected == pytest.approx(0.64)  # nothing is known of it but its validation score
    winner = selection.winner(study, OBJECTIVE, ("x",))
    assert winner is not None
    assert winner.number == 3


@pytest.mark.parametrize(
    ("m", "shift"),
    [(0.80, (-0.01 - 0.01 - 0.01) / 3), (0.70, (-0.01 - 0.01 - 0.01 + 0.00) / 4)],
    ids=["measured", "posterior"],
)
def test_the_best_preset_has_a_say_in_the_shift_only_where_a_process_took_its_luck_out(
    study: optuna.Study, m: float, shift: float
) -> None:
    """Scored 0.80 in the search and chosen for it, 0.70 on validation; base, experts and average are compared
    anyhow."""
    trial = study.ask()
    for key, value in {
        "label": "ties", "evaluation": evaluation(80), "noise": {"value": 0.002}, "outcome": "ok",
        "recipe": '{"format":1,"models":{"base":"b","experts":[["x","e"]]},"preset":"ties"}',
    }.items():  # fmt: skip
        trial.set_user_attr(key, value)
    study.tell(trial, 0.80)
    study.set_user_attr("validation", {**study.user_attrs["validation"], str(trial.number): evaluation(70)})
    means = {"0": 0.51, "1": 0.61, "2": 0.67, "5": 0.70, str(trial.number): m}
    error = next(s for s in selection.standings(study, OBJECTIVE, ("x",)) if s.record.number == 5).stderrs[0]
    study.set_user_attr(selection.POSTERIOR_ATTRIBUTE, {k: [mean, error] for k, mean in means.items()})
    rows = {s.record.number: s for s in selection.standings(study, OBJECTIVE, ("x",))}
    assert rows[5].expected == pytest.approx((0.74 + 0.70 + shift) / 2)


def test_a_sure_validation_score_outweighs_a_vague_search(study: optuna.Study) -> None:
    study.set_user_attr(selection.POSTERIOR_ATTRIBUTE, {"3": [0.99, 10.0], "5": [0.01, 10.0]})
    winner = selection.winner(study, OBJECTIVE, ("x",))
    assert winner is not None
    assert winner.number == 5


def test_finalists_meet_base_experts_average_and_the_best_baseline(study: optuna.Study) -> None:
    for label, search in (("ties", 66), ("dare", 64)):
        trial = study.ask()
        trial.set_user_attr("label", label)
        trial.set_user_attr("noise", {"value": 0.002})
        trial.set_user_attr("outcome", "ok")
        study.tell(trial, search / 100)
    found = to_validate(study, OBJECTIVE, {"c": Float(0, 1)}, seed=0, n=1)
    assert [r.label for r in found] == ["", "base", "x", "average", "ties"]
    few = to_validate(study, OBJECTIVE, {"c": Float(0, 1)}, seed=0, n=5)  # three merges of the search's own
    assert [r.label for r in few] == ["", "", "", "base", "x", "average", "ties", "dare"]


def test_a_baseline_can_win(study: optuna.Study) -> None:
    scores = dict(study.user_attrs["validation"])
    scores["2"] = evaluation(90)
    study.set_user_attr("validation", scores)
    winner = selection.winner(study, OBJECTIVE, ("x",))
    assert winner is not None
    assert winner.label == "average"
    assert "worse than baseline: average" in summary_table(study, OBJECTIVE, ("x",)).verdict


def test_the_base_may_be_the_better_answer(study: optuna.Study) -> None:
    assert selection.base_is_better(study, OBJECTIVE, ("x",)) == ""
    validation = {number: evaluation(30) for number in study.user_attrs["validation"]}
    study.set_user_attr("validation", {**validation, "0": evaluation(60), "1": evaluation(60)})
    said = selection.base_is_better(study, OBJECTIVE, ("x",))
    assert said.startswith("every merge is expected to be worse than the base in t")
    assert "the base has 0.5" in said or "the base has 0.6" in said


def test_the_verdict_is_a_paired_interval(study: optuna.Study) -> None:
    """74 against 66 of the same 100 questions, nested: 8 questions differ, all in favour. t is Student's, at 99."""
    up, down = 8.5 / 101, 0.5 / 101
    half = 1.98422 * float(np.sqrt((up + down - (up - down) ** 2) / 100))
    verdict = summary_table(study, OBJECTIVE, ("x",)).verdict
    assert "better than baseline: average" in verdict
    assert f": t +0.080, 95 % interval [{0.08 - half:+.3f}, {0.08 + half:+.3f}]" in verdict


def with_validation(study: optuna.Study, metrics: list[MetricInfo], rows: dict[int, list[list[float]]]) -> None:
    """Scores of all `metrics` on search (base and expert alone) and validation, by trial: values by metric."""

    def scored(values: list[list[float]]) -> dict[str, Any]:
        found = {}
        for m, mine in zip(metrics, map(np.array, values), strict=True):
            found[m.name] = Scores((), mine, float(mine.mean()), float(mine.std(ddof=1) / len(mine) ** 0.5))
        return Evaluation(Split.SEARCH, 1.0, found).to_attribute()

    study.set_user_attr("validation", {str(n): scored(values) for n, values in rows.items()})
    for number, label in ((0, "base"), (1, "x")):
        study.set_user_attr(f"reference.{label}", {"evaluation": scored(rows[number])})


def half(k: int, n: int = 100) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


def test_the_verdict_is_about_the_objective_not_about_the_mean_of_the_tasks(study: optuna.Study) -> None:
    """Ahead by 8 of 100 questions in `a`, where the expert gained 10, and behind by 10 in `b`, where it gained 50."""
    metrics = [MetricInfo(t, "acc", True, {Split.VALIDATION: 100}) for t in ("a", "b")]
    rows = {0: [half(50), half(20)], 1: [half(60), half(70)], 2: [half(62), half(70)], 5: [half(70), half(60)]}
    with_validation(study, metrics, rows)
    shares = [((k + 0.5) / 101, 0.5 / 101) for k in (8, 10)]
    a, b = (w**2 * (up + down - (up - down) ** 2) / 100 for w, (up, down) in zip((5, 1), shares, strict=True))
    width = float(stats.t.ppf(0.975, 99 * (a + b) ** 2 / (a**2 + b**2)) * np.sqrt(a + b))
    verdict = summary_table(study, Objective(["mean_retention"], [], [], metrics), ("x",)).verdict
    assert "better than baseline: average: mean_retention +0.300" in verdict
    assert f"[{0.3 - width:+.3f}, {0.3 + width:+.3f}]" in verdict


def test_a_verdict_where_lower_is_better_has_an_interval_too(study: optuna.Study) -> None:
    metric = MetricInfo("w", "loss", False, {Split.VALIDATION: 100})
    objective = Objective([], ["w"], [], [metric])
    noise = np.linspace(-0.1, 0.1, 100)
    rows = {n: [list(level + noise * (n + 1))] for n, level in ((0, 3.0), (1, 2.5), (2, 2.4), (5, 2.0))}
    with_validation(study, [metric], rows)
    verdict = summary_table(study, objective, ("x",)).verdict
    half_width = 1.98422 * float((noise * 3).std(ddof=1)) / 10
    assert "better than baseline: average: w -0.400" in verdict
    assert f"[{-0.4 - half_width:+.3f}, {-0.4 + half_width:+.3f}]" in verdict


def test_few_validation_questions_do_not_redefine_what_is_searched_for(study: optuna.Study) -> None:
    """On validation no expert beats the base in `b`, by chance: retention there would forget the task."""
    metrics = [MetricInfo(t, "acc", True, {Split.VALIDATION: 100}) for t in ("a", "b")]
    objective = Objective(["mean_retention"], [], [], metrics)
    searched = {0: [half(50), half(50)], 1: [half(80), half(60)]}
    with_validation(study, metrics, searched)
    kept = {f"reference.{label}": study.user_attrs[f"reference.{label}"] for label in ("base", "x")}
    later = {0: [half(50), half(55)], 1: [half(80), half(55)], 3: [half(71), half(40)], 5: [half(70), half(60)]}
    with_validation(study, metrics, later)
    for name, value in kept.items():
        study.set_user_attr(name, value)
    rows = {s.record.number: s for s in selection.standings(study, objective, ("x",))}
    assert rows[3].values[0] > rows[5].values[0]
    assert rows[3].expected == pytest.approx((0.21 / 0.3 - 0.1 / 0.1) / 2)
    assert rows[5].expected == pytest.approx((0.20 / 0.3 + 0.1 / 0.1) / 2)
    winner = selection.winner(study, objective, ("x",))
    assert winner is not None
    assert winner.number == 5


def test_the_sealed_test_compares_base_experts_average_and_the_winner(study: optuna.Study) -> None:
    study.set_user_attr("test_winner", 5)
    assert [r.number for r in selection.compared(study, OBJECTIVE)] == [0, 1, 2, 5]


def test_a_test_that_was_opened_for_another_trial_than_the_winner_says_so_and_what_to_do(study: optuna.Study) -> None:
    """Opened for trial 3; then 5 was better on validation. A baseline that wins then was tested, but only beside it."""
    study.set_user_attr("test", {str(n): evaluation(correct) for n, correct in enumerate([50, 60, 66, 70])})
    study.set_user_attr("test_winner", 3)
    text = sealed_table(study, OBJECTIVE, ("x",)).verdict
    assert "the sealed test questions were opened for trial 3;" in text
    assert "its winner is now trial 5, which has no test score. An honest one cannot be measured any more" in text
    assert "--trial 3), or trial 5 on its validation score alone" in text
    exported = card(study, OBJECTIVE, records(study)[5], ("x",))
    assert "opened for trial 3" in exported
    assert "Trial 5 itself was not scored on them" in exported
    study.set_user_attr("validation", {**study.user_attrs["validation"], "2": evaluation(90)})
    assert "now trial 2, which has a test score only from standing beside it" in _outdated(study)
    study.set_user_attr("test_winner", 2)
    assert not _outdated(study)


def _outdated(study: optuna.Study) -> str:
    return selection.outdated_test(study, OBJECTIVE, ("x",))


def test_retention_of_a_row_uses_the_references_of_its_own_split(study: optuna.Study) -> None:
    objective = Objective(["mean_retention"], [], [], [METRIC])
    row = next(r for r in selection.standings(study, objective, ("x",)) if r.record.number == 5)
    assert row.values[0] == pytest.approx((0.74 - 0.50) / (0.60 - 0.50))


def test_where_no_expert_beats_the_base_on_validation_retention_is_measured_by_the_search(study: optuna.Study) -> None:
    study.set_user_attr("validation", {**study.user_attrs["validation"], "1": evaluation(50)})
    objective = Objective(["mean_retention"], [], ["retention/t >= 0.5"], [METRIC])
    row = next(r for r in selection.standings(study, objective, ("x",)) if r.record.number == 5)
    assert row.values[0] == pytest.approx((0.74 - 0.50) / (0.60 - 0.50))
    assert row.feasible


def test_linear_objectives_have_weights_and_others_have_none() -> None:
    references = References({"t/acc": 0.5}, {"t/acc": 0.75}, {"t/acc": "x"}, 1.0)
    assert Objective(["mean_retention"], [], [], [METRIC]).weights(references) == {"t/acc": 4.0}
    assert Objective([], ["t"], [], [METRIC]).weights(references) == {"t/acc": -1.0}
    assert Objective(["worst_retention"], [], [], [METRIC]).weights(references) is None


KL = MetricInfo("drift", "kl", False, {Split.SEARCH: 100, Split.VALIDATION: 100}, is_cost=True)


def both(correct: int, kl: float) -> dict[str, Any]:
    found = Evaluation.from_attribute(evaluation(correct))
    v = np.linspace(kl - 0.05, kl + 0.05, 100)
    cost = Scores((), v, float(v.mean()), float(v.std(ddof=1) / 10))
    return Evaluation(Split.SEARCH, 1.0, {**found.scores, "drift/kl": cost}).to_attribute()


@pytest.fixture
def trade_off(tmp_path: Path) -> optuna.Study:
    """Score against drift: base, expert, average, then merges on and off the front; on validation 4 falls behind 5."""
    storage = open_storage(f"sqlite:///{tmp_path / 'm.db'}")
    study = optuna.create_study(study_name="m", storage=storage, directions=["maximize", "minimize"])
    rows = [("base", 50, 0.0, 50, 0.0), ("x", 95, 0.1, 95, 0.1), ("average", 60, 0.4, 60, 0.4), ("", 90, 0.9, 88, 0.9)]
    rows += [("", 80, 0.5, 70, 0.5), ("", 75, 0.3, 76, 0.3), ("", 70, 0.6, 70, 0.6), ("", 55, 0.2, 55, 0.2)]
    validation = {}
    for i, (label, search, kl, later, later_kl) in enumerate(rows):
        trial = study.ask()
        if label:
            trial.set_user_attr("label", label)
        trial.set_user_attr("evaluation", both(search, kl))
        trial.set_user_attr("recipe", '{"format":1,"models":{"base":"b","experts":[["x","e"]]},"preset":"ties"}')
        trial.set_user_attr("noise", {"values": [0.002, 0.0001]})
        trial.set_user_attr("outcome", "ok")
        study.tell(trial, [search / 100, kl])
        validation[str(i)] = both(later, later_kl)
    for label, row in (("base", both(50, 0.0)), ("x", both(95, 0.1))):
        study.set_user_attr(f"reference.{label}", {"evaluation": row})
    study.set_user_attr("validation", validation)
    return study


TWO = Objective(["t"], ["drift/kl"], [], [METRIC, KL])


def test_the_front_leaves_out_what_another_merge_beats_in_everything(trade_off: optuna.Study) -> None:
    merges = candidates(trade_off)
    assert [r.number for r in selection.front(merges, TWO)] == [3, 4, 5, 7]
    assert TWO.dominates((0.8, 0.5), (0.7, 0.6))
    assert not TWO.dominates((0.8, 0.5), (0.8, 0.5))
    assert not TWO.dominates((0.8, 0.5), (0.7, 0.4))


def test_finalists_are_spread_over_the_front_and_an_expert_does_not_empty_it(trade_off: optuna.Study) -> None:
    assert [r.number for r in selection.finalists(trade_off, TWO, {}, seed=0, n=2)] == [3, 7]
    assert [r.number for r in selection.finalists(trade_off, TWO, {}, seed=0, n=9)] == [3, 4, 5, 7]


def test_what_is_handed_over_is_the_front_of_the_validation_questions(trade_off: optuna.Study) -> None:
    assert [r.number for r in selection.champions(trade_off, TWO, ("x",))] == [3, 5, 7]
    table = summary_table(trade_off, TWO, ("x",))
    assert "3 merge(s) that no other beats in everything" in table.verdict
    assert len(table.emphasised) == 3
    trade_off.set_user_attr("test_winner", [3, 4, 7])
    text = selection.outdated_test(trade_off, TWO, ("x",))
    assert "opened for trials 3, 4, 7; the study went on, and its front is now trials 3, 5, 7, which has no" in text
    assert table.header == ["model", "t", "drift/kl"]


def test_trials_and_front_are_listed_from_the_storage(trade_off: optuna.Study) -> None:
    listed = trials_table(trade_off, TWO, n=3)
    assert [row[0] for row in listed.rows] == ["x", "trial 3", "trial 4"]
    assert [row[0] for row in front_table(trade_off, TWO).rows] == ["trial 3", "trial 4", "trial 5", "trial 7"]


def test_a_constraint_decides_on_the_validation_questions_too(study: optuna.Study) -> None:
    """70 is asked of every merge: 66, 71, 64 and 74 leave two; at 80 the nearest is taken and its miss is said."""
    objective = Objective(["t"], [], ["t >= base + 0.2"], [METRIC])
    rows = {s.record.number: s for s in selection.standings(study, objective, ("x",))}
    assert [n for n, s in sorted(rows.items()) if s.feasible] == [3, 5]
    upside_down = Objective([], ["t"], ["t >= base + 0.2"], [METRIC])
    found = selection.winner(study, upside_down, ("x",))
    assert found is not None
    assert found.number == 3
    strict = Objective(["t"], [], ["t >= 0.8"], [METRIC])
    found = selection.winner(study, strict, ("x",))
    assert found is not None
    assert found.number == 5
    table = summary_table(study, strict, ("x",))
    assert "It misses 't >= 0.8' there." in table.verdict
    assert table.rows[table.emphasised[0]][-1].startswith("missed by 0.060")


def test_the_average_has_a_say_in_the_shift_although_its_posterior_is_what_was_measured(study: optuna.Study) -> None:
    """It is compared whatever it scored: shift = mean(0.50 - 0.51, 0.60 - 0.61, 0.66 - 0.65)."""
    error = next(s for s in selection.standings(study, OBJECTIVE, ("x",)) if s.record.number == 5).stderrs[0]
    means = {"0": 0.51, "1": 0.61, "2": 0.65, "5": 0.70}
    study.set_user_attr(selection.POSTERIOR_ATTRIBUTE, {k: [m, error] for k, m in means.items()})
    row = next(s for s in selection.standings(study, OBJECTIVE, ("x",)) if s.record.number == 5)
    assert row.expected == pytest.approx((0.74 + 0.70 - 0.01 / 3) / 2)


def test_violations_are_added_in_their_standard_errors(study: optuna.Study) -> None:
    row = selection.standings(study, OBJECTIVE, ("x",))[-1]
    missed = {"a": Estimate(0.06, 0.03**2), "b": Estimate(-1.0, 0.01), "c": Estimate(0.5, 0.0)}
    assert replace(row, violations=missed).excess == pytest.approx(2.0 + 0.5)
    assert replace(row, violations={"b": Estimate(-1.0, 0.01)}).excess == 0.0


def test_a_merge_of_the_front_that_misses_a_constraint_is_not_handed_over(trade_off: optuna.Study) -> None:
    """On validation the front is 3, 5 and 7 with drifts 0.9, 0.3 and 0.2."""
    bound = Objective(["t"], ["drift/kl"], ["drift/kl <= 0.5"], [METRIC, KL])
    assert [r.number for r in selection.champions(trade_off, bound, ("x",))] == [5, 7]


def test_which_leads_are_real_is_what_the_search_questions_say(study: optuna.Study) -> None:
    """On validation the expert leads by 30 questions, in the search by 10."""
    study.set_user_attr("validation", {**study.user_attrs["validation"], "1": evaluation(80)})
    searched = references_of(study, [METRIC], ("x",))
    found = selection.references_on(study, OBJECTIVE, ("x",), "validation")
    assert found is not None
    assert (found.expert["t/acc"], searched.expert["t/acc"]) == (0.8, 0.6)
    assert found.lead == searched.lead


def test_validation_scores_that_are_stored_are_not_asked_for_again(study: optuna.Study) -> None:
    asked = []

    def score(recipe: Recipe) -> Evaluation:
        asked.append(recipe)
        return Evaluation.from_attribute(evaluation(50))

    file = SimpleNamespace(study=SimpleNamespace(seed=0), search=SimpleNamespace(finalists=3))
    space = SimpleNamespace(parameters={"c": Float(0, 1)})
    plan: Any = SimpleNamespace(space=space, file=file, objective=OBJECTIVE)
    stored = dict(study.user_attrs["validation"])
    validate(study, plan, score, note=lambda text: None)
    assert asked == []
    study.set_user_attr("validation", {k: v for k, v in stored.items() if k != "5"})
    validate(study, plan, score, note=lambda text: None)
    assert len(asked) == 1
    assert {k: v for k, v in study.user_attrs["validation"].items() if k != "5"} == {
        k: v for k, v in stored.items() if k != "5"
    }

"""Retention, directions, constraints and known noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from merge_search.errors import NonFiniteError, StudyFileError
from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split, SplitShares, pack, split_of, unpack
from merge_search.objective import Objective, References, _pairing
from merge_search.search.records import teachers_of

METRICS = [
    MetricInfo("a", "acc", True, {Split.SEARCH: 10}),
    MetricInfo("b", "acc", True, {Split.SEARCH: 10}),
    MetricInfo("p", "perplexity", False, {Split.SEARCH: 10}),
]


def evaluation(a: list[float], b: list[float], p: float = 3.0) -> Evaluation:
    def scores(values: list[float]) -> Scores:
        v = np.array(values, dtype=float)
        return Scores((), v, float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else math.nan)

    return Evaluation(Split.SEARCH, 1.0, {"a/acc": scores(a), "b/acc": scores(b), "p/perplexity": scores([p, p + 0.2])})


def half(k: int, n: int = 10) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


BASE = evaluation(half(4), half(5), 4.0)
EXPERTS = {"x": evaluation(half(8), half(4), 3.0), "y": evaluation(half(3), half(9), 5.0)}
REFERENCES = References.from_evaluations(METRICS, BASE, EXPERTS)


def objective(
    maximise: list[str], minimise: list[str] | None = None, constraints: list[str] | None = None
) -> Objective:
    return Objective(maximise, minimise or [], constraints or [], METRICS)


def test_each_task_has_its_own_best_expert_in_the_metrics_direction() -> None:
    assert REFERENCES.best_expert == {"a/acc": "x", "b/acc": "y", "p/perplexity": "x"}


def test_retention_is_zero_at_the_base_and_one_at_the_best_expert() -> None:
    o = objective(["retention/a", "mean_retention", "worst_retention"])
    assert [e.value for e in o.values(BASE, REFERENCES)] == pytest.approx([0, 0, 0])
    best = evaluation(half(8), half(9), 3.0)
    assert [e.value for e in o.values(best, REFERENCES)] == pytest.approx([1, 1, 1])


def test_retention_by_hand() -> None:
    candidate = evaluation(half(6), half(9), 3.5)
    values = objective(["mean_retention", "worst_retention"]).values(candidate, REFERENCES)
    assert values[0].value == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert values[1].value == pytest.approx(0.5)


def test_tasks_on_which_no_expert_beats_the_base_are_left_out_and_all_of_them_refused() -> None:
    worse = {"x": evaluation(half(4), half(4), 4.0)}
    references = References.from_evaluations(METRICS, BASE, worse)
    with pytest.raises(StudyFileError, match=r"an expert beats the base; found a/acc: base 0\.4, best expert 0\.4"):
        objective(["mean_retention"]).check_references(references)
    with pytest.raises(StudyFileError, match="an expert beats the base"):
        objective(["mean"], [], ["mean_retention >= 0.5"]).check_references(references)


def test_a_task_whose_experts_are_worse_than_the_base_has_no_retention() -> None:
    """It would be turned round: the lower the score, the higher the retention."""
    references = References.from_evaluations(METRICS, BASE, {"x": evaluation(half(8), half(3), 3.0)})
    objective(["mean_retention", "retention/a"]).check_references(references)
    with pytest.raises(StudyFileError, match="objective: retention/b needs"):
        objective(["retention/b"]).check_references(references)


def test_a_quantity_is_optimised_once() -> None:
    with pytest.raises(StudyFileError, match="'mean' stands twice"):
        objective(["mean"], ["mean"])


def test_lower_is_better_metrics_count_negatively_in_means() -> None:
    better, worse = evaluation(half(5), half(5), 3.0), evaluation(half(5), half(5), 3.5)
    o = objective(["mean"])
    assert o.values(better, REFERENCES)[0].value > o.values(worse, REFERENCES)[0].value


def test_a_perfect_score_still_has_noise() -> None:
    e = objective(["a"]).values(evaluation(half(10), half(5)), REFERENCES)[0]
    smoothed = 10.5 / 11
    assert e.variance == pytest.approx(smoothed * (1 - smoothed) / 10 * REFERENCES.pairing)


def test_pairing_is_what_identical_questions_leave() -> None:
    same = References.from_evaluations(METRICS, BASE, {"x": BASE})
    assert same.pairing == pytest.approx(0.1)  # the floor: equal answers leave nothing
    assert 0.1 < REFERENCES.pairing <= 1


def test_pairing_counts_every_metric_alike_whatever_its_unit() -> None:
    """a: 4 of 10 answers differ, (0.24 / 2) / ((0.24 + 0.16) / 2) = 0.6; p: the same for both models, 0."""

    def found(unit: float) -> float:
        p = np.linspace(1, 2, 10) * unit
        rows = [{"a": np.array(half(k)), "p": p} for k in (4, 8)]
        base, expert = (
            Evaluation(Split.SEARCH, 1.0, {n: Scores((), v, float(v.mean()), 0.1) for n, v in r.items()}) for r in rows
        )
        return _pairing([base, expert])

    assert found(1.0) == pytest.approx((0.6 + 0.0) / 2)
    assert found(1000.0) == pytest.approx(found(1.0))


@pytest.mark.parametrize(
    ("text", "violation"),
    [("a >= 0.7", 0.1), ("a >= base - 0.1", -0.3), ("p/perplexity <= expert + 0.2", 0.3), ("b <= 0.9", -0.4)],
)
def test_constraints_by_hand(text: str, violation: float) -> None:
    candidate = evaluation(half(6), half(5), 3.5)
    found = objective(["a"], constraints=[text]).violations(candidate, REFERENCES)
    assert found[text].value == pytest.approx(violation)


def test_unknown_names_and_malformed_constraints_come_together() -> None:
    with pytest.raises(StudyFileError) as caught:
        objective(["mean_retentoin"], constraints=["a > 3", "mean >= base", "c >= 1"])
    text = str(caught.value)
    assert "did you mean 'mean_retention'?" in text
    assert "'a > 3' must read like" in text
    assert "'base' can stand only beside a task or metric" in text
    assert "'c'" in text


def test_values_survive_packing() -> None:
    bits = np.array(half(7, 19))
    assert (unpack(pack(bits)) == bits).all()
    assert len(pack(bits)) < 10
    floats = np.array([-3.5, 2.25, 0.0])
    assert (unpack(pack(floats)) == floats).all()
    probabilities = np.array([0.1, 0.5, 0.999])
    assert np.abs(unpack(pack(probabilities)) - probabilities).max() < 1e-3


def test_an_evaluation_survives_storage() -> None:
    again = Evaluation.from_attribute(BASE.to_attribute())
    assert again.scores["a/acc"].score == BASE.scores["a/acc"].score
    assert (again.scores["a/acc"].values == BASE.scores["a/acc"].values).all()


def test_nan_scores_are_named() -> None:
    with pytest.raises(NonFiniteError, match="a/acc on the search split"):
        evaluation([math.nan, 1.0], half(3)).check_finite()


def test_splits_are_disjoint_and_have_their_shares() -> None:
    shares = SplitShares(0.5, 0.3, 0.2)
    splits = [split_of(f"question {i}", shares) for i in range(4000)]
    for split, share in ((Split.SEARCH, 0.5), (Split.VALIDATION, 0.3), (Split.TEST, 0.2)):
        assert abs(splits.count(split) / 4000 - share) < 0.03


def test_a_composite_is_never_minimised() -> None:
    with pytest.raises(StudyFileError) as caught:
        objective([], ["mean_retention", "retention/a", "worst"])
    assert caught.value.problems == [
        f"objective: {name!r} is larger for better models; put it under maximise"
        for name in ("mean_retention", "retention/a", "worst")
    ]


def test_a_metric_against_its_own_direction_is_said() -> None:
    """It may be meant: a task to unlearn."""
    assert objective(["mean", "a"], ["p"]).notes == []
    (text,) = objective(["p/perplexity"]).notes
    assert text.startswith("objective: the worst 'p/perplexity' is searched for, as lower is better by its evaluator")
    (text,) = objective([], ["a"]).notes
    assert "put it under maximise" in text


def test_a_task_that_no_expert_masters_belongs_to_the_base() -> None:
    worse = References.from_evaluations(METRICS, BASE, {"x": evaluation(half(8), half(4), 5.0)})
    assert teachers_of(objective(["mean"]), worse) == {"a": "x", "b": "base", "p": "base"}

"""Retention, directions, constraints and known noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from merge_search.errors import NonFiniteError, StudyFileError
from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split, SplitShares, pack, split_of, unpack
from merge_search.objective import Objective, References, _pairing, paired_interval
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


def test_pairing_leaves_out_metrics_whose_answers_never_differ() -> None:
    rows = (np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0]))
    both = [scored({"a": r, "b": np.ones(4)}) for r in rows]
    assert _pairing(both) == pytest.approx(_pairing([scored({"a": r}) for r in rows]))
    assert _pairing([scored({"b": np.ones(4)})] * 2) == 1.0


def test_pairing_leaves_out_costs() -> None:
    skill = MetricInfo("t", "acc", True, {Split.SEARCH: 4})
    seconds = MetricInfo("latency", "seconds", False, {Split.SEARCH: 4}, is_cost=True)
    answers, times = (np.array([1.0, 1, 0, 0]), np.array([1.0, 1, 1, 0])), (np.array([5.0, 6, 7, 9]), np.ones(4))

    def pairing(metrics: list[MetricInfo]) -> float:
        base, expert = (
            Evaluation(
                Split.SEARCH,
                1.0,
                {m.name: Scores((), v, float(v.mean()), 0.1) for m, v in zip([skill, seconds], values, strict=True)},
            )
            for values in zip(answers, times, strict=True)
        )
        return References.from_evaluations(metrics, base, {"x": expert}).pairing

    assert pairing([skill, seconds]) == pairing([skill]) < 0.5


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


# -- groups, weights, leads ------------------------------------------------------------------------------------------


def scored(tasks: dict[str, np.ndarray]) -> Evaluation:
    def scores(v: np.ndarray) -> Scores:
        return Scores((), v, float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))))

    return Evaluation(Split.SEARCH, 1.0, {f"{name}/acc": scores(v) for name, v in tasks.items()})


def test_weights_by_hand() -> None:
    """Retention is 0.5, 1 and 0.5: (3 x 0.5 + 1 + 0.5) / 5; p counts as its score, negative."""
    candidate = evaluation(half(6), half(9), 3.5)
    o = Objective(["mean_retention", "mean"], [], [], METRICS, task_weights={"a": 3})
    retention, mean = o.values(candidate, REFERENCES)
    assert retention.value == pytest.approx((1.5 + 1 + 0.5) / 5)
    assert mean.value == pytest.approx((3 * 0.6 + 0.9 - 3.6) / 5)
    alone = [objective([f"retention/{t}"]).values(candidate, REFERENCES)[0].variance for t in "abp"]
    assert retention.variance == pytest.approx((9 * alone[0] + alone[1] + alone[2]) / 25)
    assert o.weights(REFERENCES) == pytest.approx(
        {"a/acc": 3 / 5 / 0.4, "b/acc": 1 / 5 / 0.4, "p/perplexity": 1 / 5 / -1.0}
    )


def test_a_task_of_weight_zero_is_no_part_of_the_composites() -> None:
    o = Objective(["mean_retention", "worst_retention", "worst"], [], [], METRICS, task_weights={"a": 0, "p": 0})
    candidate = evaluation(half(1), half(7), 9.0)
    assert [e.value for e in o.values(candidate, REFERENCES)] == pytest.approx([0.5, 0.5, 0.7])
    assert o.weights(REFERENCES) == pytest.approx({"b/acc": 1 / 0.4})


def test_wrong_weights_are_told_together() -> None:
    metrics = [*METRICS, MetricInfo("part", "acc", True, {Split.SEARCH: 5}, member_of="a")]
    with pytest.raises(StudyFileError) as caught:
        Objective(["mean"], [], [], metrics, task_weights={"aa": 1, "part": 1, "b": -1.0})
    assert caught.value.problems == [
        "objective.weights: no task is called 'aa'; did you mean 'a'?",
        "objective.weights: 'part' counts as a part of 'a'; give the weight to that",
        "objective.weights: 'b' needs a number of at least 0, found -1.0",
    ]
    with pytest.raises(StudyFileError, match="at least one task needs a weight above 0"):
        Objective(["mean"], [], [], METRICS, task_weights={"a": 0, "b": 0, "p": 0})


GROUPED = [
    MetricInfo("g", "acc", True, {Split.SEARCH: 10}),
    *(MetricInfo(f"part{i}", "acc", True, {Split.SEARCH: 5}, member_of="g") for i in (1, 2)),
]


def test_a_group_counts_once_and_its_members_can_be_named() -> None:
    def of(one: list[float], two: list[float]) -> Evaluation:
        return scored({"g": np.array(one + two), "part1": np.array(one), "part2": np.array(two)})

    base, expert = of(half(1, 5), half(3, 5)), of(half(5, 5), half(2, 5))
    references = References.from_evaluations(GROUPED, base, {"x": expert})
    o = Objective(["mean_retention", "retention/part1", "part2"], [], ["part2 >= base - 0.2"], GROUPED)
    assert list(o.skills) == ["g"]
    assert [e.value for e in o.values(expert, references)] == pytest.approx([1, 1, 0.4])
    assert o.weights(references) == pytest.approx({"g/acc": 1 / 0.3})
    assert o.violations(expert, references)["part2 >= base - 0.2"].value == pytest.approx(0)
    with pytest.raises(StudyFileError, match="retention/part2 needs"):
        Objective(["retention/part2"], [], [], GROUPED).check_references(references)
    assert teachers_of(o, references) == {"g": "x", "part1": "x", "part2": "x"}
    assert references.pairing == pytest.approx(_pairing([base, expert], ["g/acc"]))


def test_a_lead_is_measured_in_paired_standard_errors() -> None:
    """One of ten differs: the mean is 0.1 and the standard error sqrt((0.1 - 0.01) 10 / 9 / 10) = 0.1."""
    references = References.from_evaluations(METRICS[:1], BASE, {"x": evaluation(half(5), half(5))})
    assert references.lead == pytest.approx({"a/acc": 1.0})
    worse = References.from_evaluations(METRICS[:1], BASE, {"x": evaluation(half(3), half(5))})
    assert worse.lead == pytest.approx({"a/acc": -1.0})
    lower = References.from_evaluations(METRICS[2:], BASE, {"x": evaluation(half(3), half(5), 3.0)})
    assert lower.lead["p/perplexity"] == math.inf  # every question is one better


def test_retention_counts_the_tasks_whose_lead_is_real_and_guards_the_others() -> None:
    """a: 4 of 10 questions are gained, 0.4 / sqrt(0.24 / 9) = 2.45 standard errors; b: one of ten, 1."""
    experts = {"x": evaluation(half(8), half(6), 4.0)}
    references = References.from_evaluations(METRICS, BASE, experts)
    assert references.lead == pytest.approx({"a/acc": 0.4 / math.sqrt(0.24 / 9), "b/acc": 1.0, "p/perplexity": 0.0})
    candidate = evaluation(half(6), half(4), 4.05)
    o = Objective(["mean_retention", "worst_retention", "retention/b"], [], [], METRICS, lead=2.0, guard=0.05)
    assert [e.value for e in o.values(candidate, references)] == pytest.approx([0.5, 0.5, -1.0])
    assert [m.task for m in o.without_lead(references)] == ["b", "p"]
    found = {text: e.value for text, e in o.violations(candidate, references).items()}
    assert found == pytest.approx({"b >= base - 0.05": 0.05, "p <= base + 0.05": 0.0})
    assert not Objective(["mean_retention"], [], [], METRICS, lead=2.0).violations(candidate, references)
    every = Objective(["mean_retention"], [], [], METRICS)
    assert [m.task for m in every.without_lead(references)] == ["p"]
    assert every.values(candidate, references)[0].value == pytest.approx((0.5 - 1.0) / 2)


def test_without_any_real_lead_the_leads_are_told() -> None:
    references = References.from_evaluations(METRICS, BASE, {"x": evaluation(half(5), half(5), 4.0)})
    with pytest.raises(StudyFileError) as caught:
        Objective(["mean_retention"], [], [], METRICS, lead=2.0).check_references(references)
    assert (
        "by more than 2 standard errors (objective.lead); found a/acc: base 0.4, best expert 0.5 (+1 standard"
        in str(caught.value)
    )


def test_each_tasks_share_of_a_mean_is_told() -> None:
    o = Objective(["mean_retention"], [], ["mean >= 0"], METRICS, task_weights={"a": 2}, lead=2.0, guard=0.05)
    assert o.weight_notes() == [
        "objective: mean is made of a 0.5, b 0.25, p 0.25",
        "objective: mean_retention is made of a 0.5, b 0.25, p 0.25; "
        "tasks where no expert leads the base by 2 standard errors are left out of it",
    ]
    references = References.from_evaluations(METRICS, BASE, {"x": evaluation(half(8), half(6), 4.0)})
    assert o.weight_notes(references)[1] == (
        "objective: mean_retention is made of a 1; no lead of an expert: "
        "b (+1 standard errors), p (+0 standard errors), guarded to 0.05 below the base at most"
    )
    assert Objective(["mean_retention"], [], [], GROUPED).weight_notes() == [
        "objective: mean_retention is made of g 1 (a group of 2)"
    ]
    assert Objective(["a"], [], [], METRICS).weight_notes() == []


def test_four_real_gains_are_not_drowned_by_the_57_subjects_of_a_group() -> None:
    """A candidate keeps 68 to 80 % of four real gains, and answers the group as well as the base and all experts do.

    One by one, a subject whose luckiest expert is ahead by one question of 90 counts with the weight 90.
    """
    rng = np.random.default_rng(0)
    real = {"gsm8k": 0.8, "humaneval": 0.72, "mbpp": 0.68, "ifeval": 0.76}  # what the merge keeps of a gain of 0.3
    models = {"base": 0.0, "x": 1.0, "y": 0.0, "z": 0.0}
    subjects = [f"subject{i}" for i in range(57)]
    apart = [MetricInfo(t, "acc", True, {Split.SEARCH: 90}) for t in [*real, *subjects]]
    members = [MetricInfo(t, "acc", True, {Split.SEARCH: 90}, member_of="mmlu") for t in subjects]
    whole = [MetricInfo(t, "acc", True, {Split.SEARCH: 90}) for t in [*real, "mmlu"]]
    before, after, counted = [], [], 0
    for _ in range(60):
        evaluations = {}
        draws = {task: rng.random(300) for task in real}
        easy = {subject: rng.random(90) < 0.6 for subject in subjects}
        for name in [*models, "merge"]:
            row = {t: (draws[t] < 0.3 + 0.3 * models.get(name, kept)).astype(float) for t, kept in real.items()}
            row |= {s: (easy[s] ^ (rng.random(90) < 0.05)).astype(float) for s in subjects}
            row["mmlu"] = np.concatenate([row[s] for s in subjects])
            evaluations[name] = scored(row)
        experts = {name: evaluations[name] for name in "xyz"}
        for metrics, lead, found in ((apart, 0.0, before), ([*whole, *members], 2.0, after)):
            references = References.from_evaluations(metrics, evaluations["base"], experts)
            o = Objective(["mean_retention"], [], [], metrics, lead=lead)
            found.append(o.values(evaluations["merge"], references)[0].value)
        counted += [m.task for m in o.without_lead(references)] == ["mmlu"]
    assert np.mean(before) < 0.4
    assert np.std(before) > 0.1
    assert np.mean(after) == pytest.approx(0.74, abs=0.03)
    assert np.std(after) < 0.05
    assert counted > 45


@pytest.mark.parametrize("n", [5, 10, 30])
@pytest.mark.parametrize(
    ("tasks", "right", "other", "alike"),
    [(1, 0.8, 0.6, 0.5), (3, 0.8, 0.6, 0.5), (3, 0.6, 0.6, 0.0), (3, 0.95, 0.9, 0.9), (1, 0.9, 0.9, 0.5)],
)
def test_paired_intervals_hold_the_difference(n: int, tasks: int, right: float, other: float, alike: float) -> None:
    """At least 93 % of the 95 % intervals of binary answers do, less three standard errors of 1 000 intervals."""
    rng = np.random.default_rng(0)
    weights = {str(t): 1.0 for t in range(tasks)}
    held = 0
    for _ in range(1000):
        u = rng.random((tasks, n))
        v = np.where(rng.random(u.shape) < alike, u, rng.random(u.shape))
        a, b = (scored(dict(zip(weights, x.astype(float), strict=True))) for x in (u < right, v < other))
        _, low, high = paired_interval(a, b, {f"{t}/acc": w for t, w in weights.items()})
        held += low - 1e-12 <= tasks * (right - other) <= high + 1e-12
    assert held / 1000 >= 0.93 - 3 * math.sqrt(0.93 * 0.07 / 1000)


def test_equal_answers_have_an_interval() -> None:
    same = scored({"a": np.ones(5)})
    difference, low, high = paired_interval(same, same, {"a/acc": 1.0})
    assert difference == 0
    assert low < -0.3
    assert high > 0.3

"""Racing stops the hopeless, spares the equal, and carries what it saw to all questions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split, window
from merge_search.objective import Objective, References
from merge_search.search.trial.racing import (
    Race,
    ask_in_parts,
    carried_to_all,
    comparable_weights,
    is_hopeless,
    panel_of,
)

LOOKS = (0.2, 0.5)


def evaluation(values: np.ndarray) -> Evaluation:
    v = values.astype(float)
    return Evaluation(Split.SEARCH, 1.0, {"t/acc": Scores((), v, float(v.mean()), float(v.std() / math.sqrt(len(v))))})


def stopped_at(candidate: np.ndarray, incumbent: np.ndarray, error: float) -> float | None:
    for look in LOOKS:
        part = candidate[window(len(candidate), look)]
        if is_hopeless(evaluation(part), evaluation(incumbent), {"t/acc": 1.0}, error=error, looks=len(LOOKS)):
            return look
    return None


def answers(rng: np.random.Generator, n: int, p: float, shared: np.ndarray, agreement: float) -> np.ndarray:
    """0/1 answers with mean p that agree with `shared` luck as often as asked."""
    own = rng.random(n)
    luck = np.where(rng.random(n) < agreement, shared, own)
    return luck < p


@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize(("n", "p", "agreement"), [(100, 0.5, 0.0), (400, 0.7, 0.5), (400, 0.95, 0.8), (60, 0.9, 0.5)])
def test_an_equal_candidate_is_stopped_no_more_often_than_stated(
    n: int, p: float, agreement: float, error: float
) -> None:
    """2 000 simulated races against an incumbent of the same true score; three standard errors of slack."""
    rng = np.random.default_rng(0)
    stops = 0
    for _ in range(2000):
        shared = rng.random(n)
        candidate, incumbent = (answers(rng, n, p, shared, agreement) for _ in range(2))
        stops += stopped_at(candidate, incumbent, error) is not None
    assert stops / 2000 <= error + 3 * math.sqrt(error * (1 - error) / 2000)


def test_a_much_worse_candidate_is_usually_stopped_at_the_first_look() -> None:
    rng = np.random.default_rng(0)
    looks = []
    for _ in range(200):
        shared = rng.random(500)
        looks.append(stopped_at(answers(rng, 500, 0.4, shared, 0.5), answers(rng, 500, 0.7, shared, 0.5), 0.05))
    assert looks.count(0.2) > 180


def test_lower_is_better_is_a_negative_weight() -> None:
    better, worse = evaluation(np.full(50, 1.0)), evaluation(np.full(50, 3.0))
    assert is_hopeless(worse, better, {"t/acc": -1.0}, error=0.05, looks=1)
    assert not is_hopeless(better, worse, {"t/acc": -1.0}, error=0.05, looks=1)


def test_a_panel_removes_the_luck_of_an_easy_prefix() -> None:
    """Error of the carried score against the full one, over many prefixes, beside that of the plain prefix mean."""
    rng = np.random.default_rng(1)
    plain, carried, stated = [], [], []
    for _ in range(300):
        difficulty = rng.random(400)
        panel = panel_of([evaluation(answers(rng, 400, 0.6, difficulty, 0.7)) for _ in range(6)])
        full = answers(rng, 400, 0.55, difficulty, 0.7).astype(float)
        prefix = evaluation(full[:50])
        s = carried_to_all(prefix, panel).scores["t/acc"]
        plain.append(full[:50].mean() - full.mean())
        carried.append(s.score - full.mean())
        stated.append(s.stderr)
    assert np.std(carried) < 0.85 * np.std(plain)
    assert np.std(carried) == pytest.approx(np.mean(stated), rel=0.25)


def test_joined_parts_equal_the_whole() -> None:
    rng = np.random.default_rng(2)
    values = (rng.random(97) < 0.6).astype(float)
    cut = window(97, 0.3).stop
    whole = evaluation(values[:cut]).joined(evaluation(values[cut:]))
    assert (whole.scores["t/acc"].values == values).all()
    assert whole.scores["t/acc"].score == values.mean()


@pytest.mark.parametrize(("n", "shares"), [(97, (0.01, 0.25, 0.5, 1.0)), (3, (0.1, 0.5, 1.0)), (1000, (0.333, 1.0))])
def test_windows_tile_the_questions(n: int, shares: tuple[float, ...]) -> None:
    after, seen = 0.0, []
    for share in shares:
        seen += list(range(n))[window(n, share, after)]
        after = share
    assert seen == list(range(n))


def test_a_verdict_does_not_depend_on_the_unit_of_a_metric() -> None:
    rng = np.random.default_rng(3)
    incumbent, candidate = rng.normal(5, 1, 40), rng.normal(5, 1, 40)
    for shift in np.linspace(0, 1, 21):
        verdicts = {
            is_hopeless(
                evaluation(k * (candidate - shift)), evaluation(k * incumbent), {"t/acc": 1 / k}, error=0.05, looks=2
            )
            for k in (0.01, 1.0, 100.0)
        }
        assert len(verdicts) == 1
    assert verdicts == {True}


def test_a_metric_that_is_a_mean_for_the_base_alone_is_not_raced() -> None:
    """f1 of a base that is never right is 0, as is its mean; the expert's shows that it is none."""
    wrong, right = evaluation(np.zeros(10)), evaluation(np.ones(10))
    half = Scores((), np.array([1.0] * 5 + [0.0] * 5), 0.67, 0.1)
    metric = MetricInfo("t", "acc", True, {Split.SEARCH: 10})
    for expert, weights in ((right, {"t/acc": 1.0}), (replace(right, scores={"t/acc": half}), None)):
        references = References.from_evaluations([metric], wrong, {"x": expert})
        assert comparable_weights(Objective(["t"], [], [], [metric]), references, [wrong, expert]) == weights


def test_more_looks_need_more_evidence_each() -> None:
    """4 of 100 lost: D = -0.04, se^2 = (0.04 * 0.96 + 1 / 100) / 100, so D / se = -1.82: z is 1.64 or 1.96."""
    incumbent, candidate = evaluation(np.ones(100)), evaluation(np.array([0.0] * 4 + [1.0] * 96))
    assert is_hopeless(candidate, incumbent, {"t/acc": 1.0}, error=0.05, looks=1)
    assert not is_hopeless(candidate, incumbent, {"t/acc": 1.0}, error=0.05, looks=2)


def test_a_prefix_is_carried_to_all_questions_by_hand() -> None:
    """Rest (0, -0.5) has variance 1/16; one unseen question in two adds 1/2; half of the questions are asked."""
    panel = {"t/acc": np.array([1.0, 0.5, 0.25, 0.75])}
    s = carried_to_all(evaluation(np.array([1.0, 0.0])), panel).scores["t/acc"]
    assert s.score == pytest.approx(0.5 + 0.625 - 0.75)
    assert s.stderr == pytest.approx(math.sqrt((1 / 16 + 1 / 2) / 2 * (1 - 2 / 4)))
    assert s.is_corrected


def test_a_candidate_that_is_worse_only_at_the_end_is_scored_on_all_questions() -> None:
    answers, asked = np.array([1.0] * 20 + [0.0] * 20), []

    def ask(share: float, after: float) -> Evaluation:
        asked.append((share, after))
        return evaluation(answers[window(40, share, after)])

    race = Race((0.25, 0.5), 0.05, {"t/acc": 1.0}, evaluation(np.ones(40)))
    found, is_stopped = ask_in_parts(ask, race)
    assert not is_stopped
    assert found.scores["t/acc"].values.tolist() == answers.tolist()
    assert asked == [(0.25, 0.0), (0.5, 0.25), (1.0, 0.5)]


def test_several_objectives_are_not_raced() -> None:
    one, two = (MetricInfo(t, "acc", True, {Split.SEARCH: 10}) for t in "tu")
    scores = {f"{t}/acc": evaluation(np.ones(10)).scores["t/acc"] for t in "tu"}
    both = Evaluation(Split.SEARCH, 1.0, scores)
    references = References.from_evaluations([one, two], both, {"x": both})
    assert comparable_weights(Objective(["t"], [], [], [one, two]), references, [both]) == {"t/acc": 1.0}
    assert comparable_weights(Objective(["t", "u"], [], [], [one, two]), references, [both]) is None

"""Recorded landscapes: what is true, what is observed, and how ways of searching are compared on them."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merge_search.evaluation import Evaluation, MetricInfo, Scores, Split
from merge_search.objective import Objective, References

FOLDER = Path(__file__).parents[2] / "benchmarks" / "search"
COEFFICIENTS = [f"coefficient.{e}.block.{b}" for e in ("one", "two") for b in range(2)]
LABELS = ["base", "one", "two", "average", "ties"]


@pytest.fixture(scope="module", autouse=True)
def _modules() -> Iterator[None]:
    """The benchmarks are scripts: their folder is on the path while these tests run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def module(name: str) -> Any:
    return importlib.import_module(name)


def truth(x: np.ndarray) -> np.ndarray:
    """Accuracy per task of a made-up landscape with its best near 0.7 everywhere. Shape (n, 4) -> (n, 2)."""
    away = ((x - 0.7) ** 2).sum(axis=1)
    return np.stack([0.9 - 0.3 * away, 0.8 - 0.2 * away], axis=1)


def table(n_points: int = 200, n_questions: int = 400) -> Any:
    """A table whose answers are right for the share that `truth` says, on the first questions."""
    points = np.random.default_rng(0).random((n_points, 4))
    labelled = np.array([[0.0] * 4, [1.0, 1.0, 0, 0], [0, 0, 1.0, 1.0], [0.5] * 4, [math.nan] * 4])
    about = {
        "name": "made_up", "metrics": ["a/acc", "b/acc"], "experts": ["one", "two"], "labels": LABELS,
        "parameters": {name: ["Float", 0.0, 1.5, False] for name in COEFFICIENTS}, "initial": [[0.6] * 4, [0.4] * 4],
    }  # fmt: skip
    task_of = np.repeat([0, 1], n_questions).astype(np.uint8)
    return module("landscapes").Table(
        about, points, answers_of(truth(points), n_questions), task_of, labelled,
        answers_of(truth(np.nan_to_num(labelled, nan=0.2)), n_questions), np.ones(n_points),
    )  # fmt: skip


def answers_of(shares: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([np.arange(n) < np.round(share * n)[:, None] for share in shares.T], axis=1)


@pytest.fixture(scope="module")
def landscape() -> Any:
    lands = module("landscapes")
    fit = lands.Fit("matern", [2.0] * 4, 1.0, 1e-6, 0.5, shared=0.3, reach=0.4, smoothness=1.5)
    return lands.Landscape(table(), [fit, fit])


def test_a_landscape_follows_its_table_between_the_points(landscape: Any) -> None:
    x = np.random.default_rng(1).random((50, 4))
    assert np.abs(landscape.scores(x) - truth(x)).max() < 0.02


def test_a_labelled_recipe_outside_the_space_keeps_its_recorded_score(landscape: Any) -> None:
    ties = landscape.baselines[-1]
    assert (ties.label, ties.x) == ("ties", None)
    assert ties.scores == pytest.approx(truth(np.full((1, 4), 0.2))[0], abs=1 / 400)


def test_retention_is_zero_at_the_base_and_its_definition_elsewhere(landscape: Any) -> None:
    assert landscape.retention(landscape.base) == pytest.approx(0)
    assert landscape.retention(landscape.best_expert) == pytest.approx(1)


def test_answers_are_a_function_of_seed_and_point(landscape: Any) -> None:
    x = np.full(4, 0.3)
    one, again, other = (landscape.observer(seed=s).answers(x) for s in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_the_share_of_right_answers_is_the_true_score_up_to_its_error(landscape: Any) -> None:
    n, x = 4000, np.full(4, 0.3)
    shares = [a.mean() for a in landscape.observer(seed=3, n_questions=[n, n]).answers(x)]
    assert shares == pytest.approx(landscape.scores(x)[0], abs=4 * math.sqrt(0.25 / n))


def test_candidates_disagree_as_often_as_their_distance_says(landscape: Any) -> None:
    """Disagreement of two candidates over many questions and seeds against the bivariate normal's."""
    lands, fits = module("landscapes"), module("fit_landscapes")
    one, fit = np.full(4, 0.3), landscape.surrogates[0].fit
    for step in (0.02, 0.2):
        other = one + step
        h = np.array([math.sqrt(4 * step**2) / 2.0])
        rho = 0.3 + 0.7 * lands.matern(h / fit.reach, fit.smoothness)
        a, b = (landscape.latent(x)[:, 0] for x in (one, other))
        expected = float(fits.disagreement(a, b, rho)[0])
        observers = [landscape.observer(seed=s, n_questions=[1000, 2]) for s in range(4)]
        found = np.mean([(o.answers(one)[0] != o.answers(other)[0]).mean() for o in observers])
        assert found == pytest.approx(expected, abs=0.03), step


def test_disagreement_has_its_closed_form_at_even_odds_and_without_correlation() -> None:
    """Sheppard: with both thresholds 0 two correlated normals differ in sign with probability acos(rho) / pi."""
    disagreement = module("fit_landscapes").disagreement
    zero, rho = np.zeros(3), np.array([0.0, 0.5, 0.9])
    assert disagreement(zero, zero, rho) == pytest.approx(np.arccos(rho) / np.pi, abs=1e-6)
    p, q = 0.8413447460685429, 0.5  # of thresholds 1 and 0
    assert disagreement(np.ones(1), np.zeros(1), np.zeros(1)) == pytest.approx([p + q - 2 * p * q])


def test_a_fitted_process_predicts_points_it_was_not_shown() -> None:
    made, fits = table(120), module("fit_landscapes")
    quality = fits.held_out(made.points, made.shares(made.answers), made.n_questions, "matern")
    assert quality["r2"] > 0.9
    assert quality["held_out"] == (np.random.default_rng(0).random(120) < 0.2).sum()


def test_a_table_is_read_as_it_was_saved(tmp_path: Path) -> None:
    made, record = table(30, 5), module("record_landscapes")
    kept = record.Table(made.points.tolist(), ["box"] * 30, list(made.answers), [1.0] * 30)
    header = {
        "about": np.array(json.dumps(made.about)), "task_of": made.task_of,
        "labelled_points": made.labelled_points, "labelled_answers": np.packbits(made.labelled_answers, axis=1),
    }  # fmt: skip
    kept.save(tmp_path / "x.npz", header)
    read = module("landscapes").Table.read(tmp_path / "x.npz", 20)
    assert (read.points == made.points[:20]).all()
    assert (read.answers == made.answers[:20]).all()
    assert (read.labelled_answers == made.labelled_answers).all()
    assert [p.tolist() for p in record.Table.load(tmp_path / "x.npz").answers] == made.answers.tolist()


@pytest.mark.parametrize("name", ["random", "cmaes", "mergekit_evolve", "df_merge", "botorch:n_startup=50"])
def test_every_opponent_begins_with_the_same_baselines_and_the_same_answers(landscape: Any, name: str) -> None:
    opponents = module("replay_opponents")
    problem = opponents.Problem(landscape, seed=0)
    trace = opponents.opponent(name)(problem, [6, 9])
    assert [b.label for b in trace.tried[:5]] == LABELS
    assert trace.observed[:5] == [problem.measure(b).value for b in landscape.baselines]
    assert sorted(trace.recommended) == [6, 9]
    assert all(n < budget for budget, n in trace.recommended.items())


def test_mergekit_evolve_alone_has_no_baselines_and_starts_at_the_average(landscape: Any) -> None:
    opponents = module("replay_opponents")
    trace = opponents.mergekit_evolve_alone(opponents.Problem(landscape, seed=0), [60])
    native = np.array(trace.tried[:8]) * 1.5
    assert np.abs(native.mean(axis=0) - 1 / 2).max() < 4 / 6 / math.sqrt(8)
    assert landscape.scores(trace.tried[trace.recommended[60]]).mean() > landscape.scores(np.full(4, 1 / 3)).mean()


def test_an_unknown_opponent_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="mergekit_evolve"):
        module("replay_opponents").opponent("magic")


def test_differences_are_paired_by_landscape_and_seed() -> None:
    def row(opponent: str, seed: int, value: float) -> dict[str, Any]:
        return {"landscape": "l", "opponent": opponent, "seed": seed, "candidates": 10, "true_mean": value,
                "true_retention": 0.0, "observed": value + 0.1}  # fmt: skip

    rows = [row("us", 0, 0.5), row("us", 1, 0.7), row("them", 0, 0.4), row("them", 1, 0.5), row("them", 2, 0.0)]
    them, us = module("replay").summary(rows, "us")
    assert (them["opponent"], them["searches"], them["pairs"]) == ("them", 3, 2)
    assert them["difference"] == pytest.approx(0.15)  # of 0.1 and 0.2
    assert them["half"] == pytest.approx(12.706205 * 0.05)  # Student's with one degree of freedom times sd / sqrt 2
    assert us["optimism"] == pytest.approx(0.1)


def recorded() -> list[str]:
    return sorted(p.stem for p in (FOLDER / "recorded").glob("*.json"))


@pytest.mark.parametrize("name", recorded())
def test_a_recorded_landscape_agrees_with_its_table(name: str) -> None:
    lands = module("landscapes")
    land = lands.load(name)
    read = lands.Table.read(FOLDER / "recorded" / f"{name}.npz")
    found, shares = land.scores(read.points).mean(axis=1), read.shares(read.answers).mean(axis=1)
    assert np.corrcoef(found, shares)[0, 1] > 0.95
    assert np.sqrt(((found - shares) ** 2).mean()) < 0.04


@pytest.mark.parametrize(
    ("name", "without"),
    [("lm_mission", 0), ("lm_kind", 0), ("lm_ties", 0), ("encoder_blockwise", 1)],
)
def test_leads_of_the_recorded_experts(name: str, without: int) -> None:
    """All leads of the language models are real, so the rule changes no retention of theirs.

    One of the five encoders is ahead of the base by 1.7 standard errors on its 78 recorded questions.
    """
    table = module("landscapes").Table.read(FOLDER / "recorded" / f"{name}.npz")
    infos = [MetricInfo(f"t{t}", "acc", True, {Split.SEARCH: n}) for t, n in enumerate(table.n_questions)]

    def evaluation(answers: np.ndarray) -> Evaluation:
        values = [answers[table.task_of == t].astype(float) for t in range(len(infos))]
        return Evaluation(
            Split.SEARCH, 1.0, {m.name: Scores((), v, float(v.mean()), 0.1) for m, v in zip(infos, values, strict=True)}
        )

    labelled = dict(zip(table.about["labels"], map(evaluation, table.labelled_answers), strict=True))
    experts = {e: labelled[e] for e in table.about["experts"]}
    references = References.from_evaluations(infos, labelled["base"], experts)
    ruled, plain = (Objective(["mean_retention"], [], [], infos, lead=lead) for lead in (2.0, 0.0))
    assert len(ruled.without_lead(references)) == without
    if not without:
        for answers in table.answers[:50]:
            both = (o.values(evaluation(answers), references) for o in (ruled, plain))
            assert next(both) == next(both)

"""The noise-aware sampler: what it learns from noise, failures, constraints and fitted trials; what it recommends."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from random_studies import MIXED, fill, new_study, smooth, tell

from merge_search.errors import StorageError
from merge_search.outcome import Outcome
from merge_search.search.samplers import acquisition, distributions, suggest
from merge_search.search.samplers.history import read_history
from merge_search.search.samplers.noisy_gp import FALLBACK_ATTRIBUTE, default_n_startup
from merge_search.search.samplers.numerics import numerics
from merge_search.search.samplers.recommend import recommend
from merge_search.search.samplers.unit_cube import UnitCube, holds
from merge_search.space import Categorical, Float, Integer, Parameter

optuna.logging.set_verbosity(optuna.logging.WARNING)


LINE: dict[str, Parameter] = {"x": Float(0, 1), "y": Float(0, 1)}


def line_study(name: str = "botorch", **options) -> optuna.Study:
    return new_study(name, parameters=LINE, **options)


def add(study: optuna.Study, point, value, *, variance: float | None = 1e-4, constraint=None, **attributes) -> None:
    noise = {} if variance is None else {"noise": {"value": variance}}
    if constraint is not None:
        noise["noise"]["constraint:size"] = 1e-4
    study.add_trial(
        create_trial(
            value=value,
            params=point,
            distributions=distributions(LINE) if point else {},
            user_attrs={**noise, **attributes},
            constraints=None if constraint is None else {"size": constraint},
        )
    )


def add_failure(study: optuna.Study, point, outcome: Outcome) -> None:
    study.add_trial(
        create_trial(
            state=TrialState.FAIL, params=point, distributions=distributions(LINE), user_attrs={"outcome": str(outcome)}
        )
    )


def enqueued(study: optuna.Study, point: dict[str, float]) -> optuna.Trial:
    study.enqueue_trial(point)
    trial = study.ask()
    suggest(trial, LINE)
    return trial


def grid(n: int) -> list[dict[str, float]]:
    """n x n points in the middle of equal cells."""
    return [{"x": (i + 0.5) / n, "y": (j + 0.5) / n} for i in range(n) for j in range(n)]


class TestNoisyGP:
    def test_a_complete_trial_without_its_noise_is_an_error(self):
        study = line_study()
        add(study, {"x": 0.5, "y": 0.5}, 1.0, variance=None)
        with pytest.raises(StorageError, match=r"noise variance .* trial 0\b"):
            suggest(study.ask(), LINE)

    @pytest.mark.parametrize("variance", [-1.0, math.inf, "0.1"])
    def test_a_variance_that_is_none_is_an_error(self, variance):
        study = line_study()
        add(study, {"x": 0.5, "y": 0.5}, 1.0, variance=variance)
        with pytest.raises(StorageError, match=">= 0"):
            suggest(study.ask(), LINE)

    def test_an_imported_trial_gets_the_median_of_the_known_variances(self):
        study = line_study()
        for point, variance in zip(grid(2), (1.0, 2.0, 9.0, None), strict=True):
            add(study, point, 0.0, variance=variance, imported=variance is None)
        history = read_history(study, UnitCube(LINE))
        assert history.objectives[0].variances.tolist() == [1.0, 2.0, 9.0, 2.0]

    def test_starts_with_spread_points_and_counts_enqueued_ones(self):
        study = line_study(n_startup=8)
        points = []
        for _ in range(8):
            trial = study.ask()
            points.append(suggest(trial, LINE))
            tell(study, trial, [0.0])
        assert {(int(2 * p["x"]), int(2 * p["y"])) for p in points} == {(0, 0), (0, 1), (1, 0), (1, 1)}
        assert default_n_startup(UnitCube(LINE)) == 6
        assert default_n_startup(UnitCube({"c": Categorical(tuple("abcdefghi"))})) == 11

    def test_a_failed_model_falls_back_to_a_quasi_random_point_and_says_so(self):
        study = line_study()
        for i, point in enumerate(grid(3)):
            add(study, point, 1e308 * (-1) ** i)  # their squares overflow
        trial = study.ask()
        assert holds(LINE, suggest(trial, LINE))
        assert "Error" in study.trials[trial.number].user_attrs[FALLBACK_ATTRIBUTE]

    @pytest.mark.parametrize(("outcome", "avoided"), [(Outcome.OUT_OF_MEMORY, True), (Outcome.LOST, False)])
    def test_points_that_crash_are_avoided_and_lost_ones_are_not(self, outcome, avoided):
        """The objective rises with x; everything beyond x = 0.6 failed."""
        study = line_study()
        for point in grid(5):
            if point["x"] > 0.6:
                add_failure(study, point, outcome)
            else:
                add(study, point, point["x"])
        points = [suggest(study.ask(), LINE) for _ in range(3)]
        assert (max(p["x"] for p in points) < 0.72) == avoided

    def test_constraints_are_respected(self):
        """The objective rises with x; feasible is x + y <= 0.8."""
        study = line_study()
        for point in grid(5):
            add(study, point, point["x"], constraint=point["x"] + point["y"] - 0.8)
        points = [suggest(study.ask(), LINE) for _ in range(3)]
        assert all(p["x"] > 0.5 and p["x"] + p["y"] < 0.85 for p in points)

    def test_candidates_are_drawn_around_the_best_feasible_points(self):
        """The objective rises with x; feasible is x <= 0.6, so the best of a 5 x 5 grid are those at x = 0.5."""
        study, cube = line_study(), UnitCube(LINE)
        for point in grid(5):
            add(study, point, point["x"], constraint=point["x"] - 0.6)
        history = read_history(study, cube)
        best = acquisition._best_points(acquisition._fit_all(history, cube, "tied"), history)
        assert best[:, 0].tolist() == pytest.approx([0.5] * 5)

    def test_up_to_three_objectives_are_improved_by_hypervolume_and_more_by_random_weights(self):
        for m, kind in ((2, "Hypervolume"), (3, "Hypervolume"), (4, "NoisyExpectedImprovement")):
            study, cube = line_study(m=m), UnitCube(LINE)
            for point in grid(3):
                trial = enqueued(study, point)
                tell(study, trial, [point["x"], -point["x"], point["y"], -point["y"]][:m])
            history = read_history(study, cube)
            models = acquisition._fit_all(history, cube, "tied")
            found = acquisition._acquisition(models, history, seed=0, multi_objective="auto")
            assert kind in type(found).__name__

    def test_the_reference_point_of_the_hypervolume_is_that_of_the_front(self):
        """Trials that others beat in everything, however bad, do not make the front look small."""
        study, cube = line_study(m=2), UnitCube(LINE)
        for point in grid(3):
            bad = 0.0 if point["y"] > 0.5 else -100.0
            tell(study, enqueued(study, point), [point["x"] + bad, 1 - point["x"] + bad])
        history = read_history(study, cube)
        models = acquisition._fit_all(history, cube, "tied")
        found = acquisition._acquisition(models, history, seed=0, multi_objective="hypervolume")
        means = models.means(history.points)
        front = means[means.sum(1).topk(3).indices]
        assert front.min() > means.median()
        assert (found.ref_point > front.min(0).values - (front.max(0).values - front.min(0).values)).all()

    def test_ever_smaller_steps_find_a_more_promising_point_than_the_first_candidates(self, monkeypatch):
        study, cube = line_study(), UnitCube(LINE)
        for point in grid(3):
            add(study, point, -((point["x"] - 0.4) ** 2) - (point["y"] - 0.6) ** 2)
        history = read_history(study, cube)
        with numerics(3):
            models = acquisition._fit_all(history, cube, "tied")
            promise = acquisition._acquisition(models, history, seed=3, multi_objective="auto")

            def found() -> float:
                point = acquisition.propose(history, cube, seed=3)
                return promise(torch.tensor([[point]], dtype=torch.double)).item()

            refined = found()
            monkeypatch.setattr(acquisition, "REFINEMENTS", ())
            assert refined > found()

    def test_the_model_of_crashes_is_feasible_where_trials_ran(self):
        study, cube = line_study(), UnitCube(LINE)
        for point in grid(5):
            if point["x"] > 0.6:
                add_failure(study, point, Outcome.OUT_OF_MEMORY)
            else:
                add(study, point, point["x"])
        history = read_history(study, cube)
        models = acquisition._fit_all(history, cube, "tied")
        (limit,) = models.limits
        ran, crashed = (limit.model.posterior(x).mean for x in (history.points, history.failed))
        assert (len(ran), len(crashed)) == (15, 10)
        assert ran.max() < limit.standardise(0.0) < crashed.min()  # feasible is below

    def test_steps_move_some_numbers_and_leave_others(self):
        parameters: dict[str, Parameter] = {f"c{i}": Float(0, 1) for i in range(10)}
        steps = acquisition._Steps(UnitCube(parameters), seed=0)
        moved = steps.around(torch.full((1, 10), 0.5, dtype=torch.double), 400, 0.05) != 0.5
        assert 0.3 < moved.double().mean() < 0.7
        counts = moved.sum(1)
        assert counts.min() < 3  # some steps go along few directions, some along nearly all
        assert counts.max() > 8

    def test_never_repeats_a_point_while_a_new_one_is_left(self):
        parameters: dict[str, Parameter] = {"preset": Categorical(("a", "b", "c")), "k": Integer(1, 3)}
        study = new_study("botorch", parameters=parameters, n_startup=1)
        points = set()
        for _ in range(9):
            trial = study.ask()
            points.add(tuple(suggest(trial, parameters).values()))
            tell(study, trial, [0.5])
        assert len(points) == 9
        assert suggest(study.ask(), parameters)

    def test_a_space_of_categories_alone_is_searched(self):
        parameters: dict[str, Parameter] = {n: Categorical(tuple("abcd")) for n in ("p", "q", "r")}
        study = new_study("botorch", parameters=parameters)
        for _ in range(24):
            trial = study.ask()
            point = suggest(trial, parameters)
            tell(study, trial, [float(sum(v == "c" for v in point.values()))])
        assert study.best_value == 3.0  # 24 random ones of 64 would find it with probability 0.31

    def test_a_space_with_nothing_to_choose_is_no_error(self):
        parameters: dict[str, Parameter] = {"p": Categorical(("a",)), "k": Integer(2, 2)}
        assert suggest(new_study("botorch", parameters=parameters).ask(), parameters) == {"p": "a", "k": 2}

    def test_a_partly_enqueued_trial_keeps_its_values(self):
        study = new_study("botorch")
        fill(study)
        study.enqueue_trial({"preset": "mean", "rank": 5})
        point = suggest(study.ask(), MIXED)
        assert (point["preset"], point["rank"]) == ("mean", 5)

    @pytest.mark.parametrize("option", ["hypervolume", "parego"])
    def test_several_objectives_are_improved_together(self, option):
        """max (-(x - 0.2)^2, -(x - 0.6)^2) - (y - 0.5)^2: the front is x in [0.2, 0.6] at y = 0.5."""
        study = line_study(m=2, multi_objective=option)
        for _ in range(16):
            trial = study.ask()
            x, y = suggest(trial, LINE).values()
            tell(study, trial, [-((x - a) ** 2) - (y - 0.5) ** 2 for a in (0.2, 0.6)])
        late = [t.params for t in study.trials[10:]]  # two after the first model
        near = [p for p in late if 0.1 < p["x"] < 0.7 and 0.35 < p["y"] < 0.65]
        assert len(near) >= 4  # of 6; uniform points: 1.1

    def test_every_suggestion_of_parego_weighs_the_objectives_anew(self, monkeypatch):
        weights = []
        scalarise = acquisition.get_chebyshev_scalarization

        def seen(drawn, **rest):
            weights.append(tuple(drawn.tolist()))
            return scalarise(drawn, **rest)

        monkeypatch.setattr(acquisition, "get_chebyshev_scalarization", seen)
        study = line_study(m=2, multi_objective="parego")
        for _ in range(10):
            trial = study.ask()
            x, y = suggest(trial, LINE).values()
            tell(study, trial, [x, -x * y])
        assert len(set(weights)) == len(weights) == 10 - default_n_startup(UnitCube(LINE))
        assert all(min(w) >= 0 and sum(w) == pytest.approx(1) for w in weights)
        assert max(w[0] for w in weights) - min(w[0] for w in weights) > 0.2

    @pytest.mark.slow
    def test_finds_better_points_than_random_search_on_a_noisy_mixed_function(self):
        """Regret of the recommended point after 30 trials, mean of three seeds, each with noise of 0.01."""
        regret = {}
        for name in ("botorch", "random"):
            losses = []
            for seed in range(3):
                study, rng = new_study(name, seed=seed), np.random.default_rng(seed)
                for _ in range(30):
                    trial = study.ask()
                    value = smooth(suggest(trial, MIXED)) + 0.01 * rng.standard_normal()
                    trial.set_user_attr("noise", {"value": 1e-4})
                    study.tell(trial, value)
                best = recommend(study, MIXED, seed=seed)[0].number
                losses.append(0.7 - smooth(study.trials[best].params))
            regret[name] = np.mean(losses)
        assert regret["botorch"] < 0.5 * regret["random"]


LEARNED: dict[str, Parameter] = {**LINE, "learner.steps": Categorical((0, 100))}


class TestFittedTrials:
    """A trial with `learner.steps` has a value that its coefficients alone would not have, and costs 50 times as
    much."""

    def study(self, *, bonus: float, **options) -> optuna.Study:
        """3 x 3 plain and fitted trials of a hill at (0.5, 0.5); fitting adds `bonus`."""
        study = new_study("botorch", parameters=LEARNED, **options)
        for point in grid(3):
            for steps in (0, 100):
                value = 0.7 - 0.2 * (point["x"] - 0.5) ** 2 - 0.2 * (point["y"] - 0.5) ** 2 + bonus * (steps > 0)
                study.add_trial(
                    create_trial(
                        value=value,
                        params={**point, "learner.steps": steps},
                        distributions=distributions(LEARNED),
                        user_attrs={"noise": {"value": 4e-4}, "cost": [0.1, 1.0, 600 + 300 * steps]},
                    )
                )
        return study

    @pytest.mark.parametrize(("cost_power", "steps"), [(0.0, 100), (1.0, 0)])
    def test_improvement_is_divided_by_the_questions_it_takes(self, cost_power, steps):
        """Fitting is a little better: it is chosen where cost is ignored, and not where it counts in full."""
        study = self.study(bonus=0.02, cost_power=cost_power)
        assert suggest(study.ask(), LEARNED)["learner.steps"] == steps

    def test_what_is_much_better_is_chosen_in_spite_of_its_cost(self):
        study = self.study(bonus=0.2, cost_power=1.0)
        assert suggest(study.ask(), LEARNED)["learner.steps"] == 100

    def test_plain_points_are_not_sought_where_only_fitted_ones_were_good(self):
        """Plain: falls with x. Fitted: good, and tried at x = 0.9 alone."""
        study = new_study("botorch", parameters=LEARNED)
        for point in grid(4):
            for steps in (0, 100) if point["x"] > 0.8 else (0,):
                study.add_trial(
                    create_trial(
                        value=0.75 if steps else 0.7 - 0.3 * point["x"],
                        params={**point, "learner.steps": steps},
                        distributions=distributions(LEARNED),
                        user_attrs={"noise": {"value": 4e-4}},
                    )
                )
        plain = [r for r in recommend(study, LEARNED, seed=0) if not study.trials[r.number].params["learner.steps"]]
        by_x = [study.trials[r.number].params["x"] for r in plain]
        assert by_x[:4] == [0.125] * 4
        assert by_x[-4:] == [0.875] * 4


class TestRecommend:
    def test_prefers_a_well_measured_trial_to_a_lucky_one(self):
        """A flat hill at (0.5, 0.5); the lucky trial lies low, measured with a large and known variance."""
        study = line_study()
        for point in grid(4):
            add(study, point, 0.7 - (point["x"] - 0.5) ** 2 - (point["y"] - 0.5) ** 2)
        add(study, {"x": 0.1, "y": 0.1}, 0.9, variance=0.04)  # true: 0.38
        ranked = recommend(study, LINE, seed=0)
        lucky = next(r for r in ranked if r.number == 16)
        assert study.best_trial.number == 16
        assert ranked[0].number in (5, 6, 9, 10)
        assert lucky.mean == pytest.approx(0.38, abs=0.05)
        assert ranked == recommend(study, LINE, seed=0)

    def test_a_fit_that_was_cut_short_is_no_luckier_than_its_neighbours_say(self):
        """The sampler does not see it, but as a candidate it is predicted as all others are."""
        study = line_study()
        for point in grid(4):
            add(study, point, 0.7 - (point["x"] - 0.5) ** 2 - (point["y"] - 0.5) ** 2)
        add(study, {"x": 0.1, "y": 0.1}, 0.9, variance=0.04, cut_short=True)  # true: 0.38
        found = {r.number: r.mean for r in recommend(study, LINE, seed=0)}
        assert found[16] == pytest.approx(0.38, abs=0.05)

    def test_the_same_lucky_value_wins_if_it_is_known_to_be_exact(self):
        study = line_study()
        for point in grid(4):
            add(study, point, 0.7 - (point["x"] - 0.5) ** 2 - (point["y"] - 0.5) ** 2)
        add(study, {"x": 0.1, "y": 0.1}, 0.9, variance=1e-6)
        assert recommend(study, LINE, seed=0)[0].number == 16

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_works_with_few_trials_and_equal_values(self, n):
        study = line_study()
        for point in grid(2)[:n]:
            add(study, point, 0.5)
        ranked = recommend(study, LINE, seed=0)
        assert [r.mean for r in ranked] == pytest.approx([0.5] * n)
        assert all(0 < r.sd < 0.02 for r in ranked)

    def test_a_trial_outside_the_space_keeps_its_measured_value(self):
        study = line_study()
        add(study, {}, 0.8, variance=0.01)
        for point in grid(2):
            add(study, point, 0.5)
        first = recommend(study, LINE, seed=0)[0]
        assert (first.number, first.mean, first.sd) == (0, 0.8, pytest.approx(0.1))

    def test_different_recipes_at_one_point_keep_what_was_measured_and_equal_ones_share_it(self):
        """Fits that begin elsewhere end elsewhere: the mean of their scores is not what any of them is worth."""
        study = line_study()
        for point in grid(2):
            add(study, point, 0.5)
        for value, recipe in ((0.6, "a"), (0.8, "b")):
            add(study, {"x": 0.5, "y": 0.5}, value, fingerprint=recipe)
        for value in (0.4, 0.44):
            add(study, {"x": 0.9, "y": 0.1}, value, fingerprint="c")
        found = {r.number: r for r in recommend(study, LINE, seed=0)}
        assert [(found[n].mean, found[n].sd) for n in (4, 5)] == [
            (0.6, pytest.approx(0.01)),
            (0.8, pytest.approx(0.01)),
        ]
        assert found[6].mean == pytest.approx(found[7].mean)
        assert found[6].sd < 0.01
        assert next(iter(found)) == 5

    def test_short_and_infeasible_trials_are_not_recommended(self):
        study = line_study()
        a, b, c, d = grid(2)
        add(study, a, 0.5, constraint=-1.0)
        add(study, b, 0.9, constraint=1.0)
        add(study, c, 0.9, constraint=-1.0, fidelity=0.25)
        add(study, d, 0.6, constraint=0.0)
        assert [r.number for r in recommend(study, LINE, seed=0)] == [3, 0]

    def test_three_trials_of_the_space_are_enough_for_a_model_and_two_keep_what_was_measured(self):
        values = {0.0: 0.4, 0.05: 0.6, 0.1: 0.5}
        for n in (2, 3):
            study = line_study()
            for x in list(values)[:n]:
                add(study, {"x": x, "y": 0.5}, values[x], variance=0.04)
            found = {r.number: r for r in recommend(study, LINE, seed=0)}
            if n == 2:
                assert [(found[i].mean, found[i].sd) for i in (0, 1)] == [(0.4, pytest.approx(0.2)), (0.6, 0.2)]
            else:
                assert abs(found[0].mean - found[1].mean) < 0.1
                assert all(r.sd < 0.2 for r in found.values())

    def test_equal_trials_come_in_the_order_of_their_numbers_and_infinite_ones_do_not_come(self):
        study = line_study()
        for value in (0.5, math.inf, 0.5, 0.5, -math.inf):
            add(study, {}, value)
        assert [r.number for r in recommend(study, LINE, seed=0)] == [0, 2, 3]

    def test_an_imported_trial_without_a_variance_has_the_median_of_the_others(self):
        study = line_study()
        for variance in (0.01, 0.04, 0.09):
            add(study, {}, 0.5, variance=variance)
        add(study, {}, 0.8, variance=None, imported=True)
        first = recommend(study, LINE, seed=0)[0]
        assert (first.number, first.sd) == (3, pytest.approx(0.2))

    def test_nothing_is_recommended_before_anything_is_finished(self):
        assert recommend(line_study(), LINE, seed=0) == []

    def test_smaller_is_better_where_the_study_says_so(self):
        study = optuna.create_study(direction="minimize")
        for point in grid(3):
            add(study, point, point["x"])
        ranked = recommend(study, LINE, seed=0)
        assert ranked[0].mean == pytest.approx(1 / 6, abs=0.02)
        assert [r.mean for r in ranked] == sorted(r.mean for r in ranked)

    def test_several_objectives_have_no_best_trial(self):
        with pytest.raises(StorageError, match="one objective"):
            recommend(line_study(m=2), LINE, seed=0)

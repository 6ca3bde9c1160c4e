"""The unit cube of a search space, and the Gaussian process over it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_studies import MIXED

from merge_search.errors import SpaceError
from merge_search.search.samplers import CUT_ATTRIBUTE, distributions
from merge_search.search.samplers.builtin import StudyOfSpace
from merge_search.search.samplers.cost import log_cost
from merge_search.search.samplers.history import History, Quantity, read_history
from merge_search.search.samplers.kernels import fit, make_kernel, shared_scales
from merge_search.search.samplers.numerics import numerics
from merge_search.search.samplers.unit_cube import UnitCube, holds
from merge_search.space import Categorical, Float, Integer, Parameter


def random_point(parameters: Mapping[str, Parameter], rng: np.random.Generator) -> dict[str, object]:
    cube = UnitCube(parameters)
    unit = [*rng.random(len(cube.numeric)), *[float(rng.integers(k)) for k in cube.n_choices]]
    return {
        **{n: p.low for n, p in parameters.items() if isinstance(p, Float) and p.low == p.high},
        **cube.decode(unit),
    }


class TestUnitCube:
    @settings(deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.integers(0, 2), st.integers(0, 1))
    def test_a_decoded_point_encodes_to_coordinates_that_decode_to_it(self, numbers, preset, rescale):
        cube = UnitCube(MIXED)
        point = {"fixed": 2.0, **cube.decode([*numbers, preset, rescale])}
        assert holds(MIXED, point)
        again = {"fixed": 2.0, **cube.decode(cube.encode(point))}
        assert [again[k] for k in ("preset", "rescale")] == [point[k] for k in ("preset", "rescale")]
        assert [again[k] for k in cube.numeric] == pytest.approx([point[k] for k in cube.numeric], rel=1e-12, abs=1e-12)

    def test_both_ends_are_reached_and_whole_numbers_have_equal_cells(self):
        cube = UnitCube({"x": Float(0.01, 1.0, log=True), "k": Integer(1, 4)})
        assert cube.decode([0.0, 0.0]) == {"x": pytest.approx(0.01), "k": 1}
        assert cube.decode([1.0, 1.0]) == {"x": 1.0, "k": 4}
        assert cube.encode({"x": 0.1, "k": 2}) == pytest.approx([0.5, 0.375])
        assert [cube.decode([0.5, u])["k"] for u in (0.24, 0.26, 0.49, 0.51, 0.76)] == [1, 2, 2, 3, 4]

    @pytest.mark.parametrize(
        "change", [{"rank": 2.5}, {"rank": 7}, {"preset": "tias"}, {"rescale": 1}, {"coefficient.maths": True}]
    )
    def test_a_point_outside_the_domains_has_no_coordinates(self, change):
        point = random_point(MIXED, np.random.default_rng(0))
        assert UnitCube(MIXED).encode(point) is not None
        assert UnitCube(MIXED).encode(point | change) is None
        assert UnitCube(MIXED).encode({k: v for k, v in point.items() if k != "rank"}) is None

    def test_all_bad_bounds_are_reported_at_once(self):
        with pytest.raises(SpaceError, match=r"(?s)2 problems.*x: .*y: "):
            distributions({"x": Float(1, 0), "y": Float(0, 1, log=True), "z": Float(0, 1)})


class TestKernels:
    def test_numbers_of_a_kind_share_a_length_scale(self):
        names = [
            "coefficient.a.block.0",
            "density.a",
            "coefficient.b.rest",
            "learner.step_size",
            "learner.pull",
            "scale",
        ]
        assert shared_scales(names) == [0, 1, 0, 2, 3, 4]
        assert shared_scales(names, "plain") == [0, 1, 2, 3, 4, 5]

    def test_a_tied_kernel_falls_with_distance_alike_in_all_coefficients(self):
        cube = UnitCube({"coefficient.a": Float(0, 1), "coefficient.b": Float(0, 1), "density": Float(0, 1)})
        kernel = make_kernel("tied", cube)
        kernel.base_kernel.raw_scales.data = torch.tensor([0.5, 2.0], dtype=torch.double)
        kernel.outputscale = 3.0
        points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]], dtype=torch.double)
        with torch.no_grad():
            found = kernel(points).to_dense()[0]
        expected = [3.0 * math.exp(-e) for e in (0.0, 0.5, 0.5, 0.5 / 16)]  # squared distance in scales, halved
        assert found.tolist() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("name", ["tied", "plain"])
    def test_covariance_is_positive_definite(self, name):
        cube = UnitCube(MIXED)
        rng = np.random.default_rng(0)
        points = torch.tensor([cube.encode(random_point(MIXED, rng)) for _ in range(20)], dtype=torch.double)
        with torch.no_grad():
            covariance = make_kernel(name, cube)(points).to_dense()
        torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-12)
        assert torch.linalg.eigvalsh(covariance).min() > 0

    def test_a_fitted_trial_says_nothing_about_the_coefficients_of_one_that_is_not(self):
        """With the choice's share of the level taken out, covariance is zero between steps 0 and steps 50."""
        cube = UnitCube({"coefficient.a": Float(0, 1), "learner.steps": Categorical((0, 50, 100))})
        kernel = make_kernel("tied", cube)
        kernel.raw_level.data = torch.tensor(1e-4, dtype=torch.double)
        points = torch.tensor([[0.3, 0], [0.3, 1], [0.3, 2], [0.4, 0]], dtype=torch.double)
        with torch.no_grad():
            covariance = kernel(points).to_dense()
        assert covariance[0, 1:3].tolist() == pytest.approx([0, 0], abs=1e-4)
        assert covariance[1, 2] > 0.5
        assert covariance[0, 3] > 0.5
        assert torch.linalg.eigvalsh(covariance).min() > 0

    def test_posterior_follows_the_measurements_as_far_as_their_noise_allows(self):
        """At one point measured 100 times the posterior is the mean, with the variance of the mean."""
        points = torch.full((100, 2), 0.5, dtype=torch.double)
        values = 0.3 + 0.1 * torch.tensor([1.0, -1.0] * 50, dtype=torch.double)
        quantity = Quantity(points, values, torch.full((100,), 0.01, dtype=torch.double))
        with numerics(0):
            mean, covariance = fit(
                quantity, make_kernel("tied", UnitCube({"x": Float(0, 1), "y": Float(0, 1)}))
            ).posterior(points[:1])
        assert mean.item() == pytest.approx(0.3, abs=1e-3)
        assert covariance.item() == pytest.approx(1e-4, rel=0.1)


class TestCost:
    CUBE = UnitCube({"coefficient.a": Float(0, 1), "learner.steps": Categorical((0, 50, 100))})

    def history(self, trials: Sequence[tuple[float, float]]) -> History:
        """Of (choice of steps, questions)."""
        points = torch.tensor([[0.5, choice] for choice, _ in trials], dtype=torch.double)
        none = torch.zeros(0, 2, dtype=torch.double)
        values = torch.zeros(len(trials), dtype=torch.double)
        questions = torch.tensor([asked for _, asked in trials], dtype=torch.double)
        return History(list(range(len(trials))), [Quantity(points, values, None)], {}, none, none, questions)

    def predicted(self, trials: Sequence[tuple[float, float]]) -> list[float]:
        points = torch.tensor([[0.1, 0], [0.2, 1], [0.3, 2]], dtype=torch.double)
        return log_cost(self.history(trials), self.CUBE, points).exp().tolist()

    def test_questions_lie_on_a_line_in_the_steps_and_trials_without_any_are_left_out(self):
        assert self.predicted([(0, 600), (2, 30_600), (0, 0)]) == pytest.approx([600, 15_600, 30_600])

    def test_raced_trials_are_averaged(self):
        assert self.predicted([(0, 600), (0, 400), (2, 30_500)]) == pytest.approx([500, 15_500, 30_500])

    def test_one_number_of_steps_makes_all_cost_the_same(self):
        assert self.predicted([(0, 600), (0, 400)]) == pytest.approx([500, 500, 500])

    def test_nothing_known_costs_nothing(self):
        assert self.predicted([(0, 0), (1, 0)]) == [1, 1, 1]
        space = UnitCube({"coefficient.a": Float(0, 1)})
        assert log_cost(self.history([(0, 5)]), space, torch.zeros(2, 1)).tolist() == [0, 0]


def test_a_fit_that_the_budget_cut_short_says_nothing_about_its_point():
    study, space = optuna.create_study(direction="maximize"), {"x": Float(0, 1)}
    for cut in (False, True):
        trial = study.ask(distributions(space))
        trial.set_user_attr("noise", {"value": 1e-4})
        if cut:
            trial.set_user_attr(CUT_ATTRIBUTE, True)
        study.tell(trial, 0.5)
    assert read_history(study, UnitCube(space)).numbers == [0]
    assert read_history(study, UnitCube(space), with_cut_short=True).numbers == [0, 1]
    assert [t.number for t in StudyOfSpace(study, space).trials] == [0]


def test_the_same_answers_at_the_same_point_are_one_measurement():
    study, space = optuna.create_study(direction="maximize"), {"x": Float(0, 1)}
    for number, x in enumerate((0.25, 0.25, 0.75)):
        study.enqueue_trial({"x": x})
        trial = study.ask(distributions(space))
        trial.set_user_attr("noise", {"value": 1e-4})
        if number:
            trial.set_user_attr("same_as", 0)
        study.tell(trial, 0.5)
    assert read_history(study, UnitCube(space)).numbers == [0, 2]


def _told(values: Sequence[float], errors: Sequence[float]) -> optuna.Study:
    study = optuna.create_study(direction="minimize")
    for i, (value, error) in enumerate(zip(values, errors, strict=True)):
        study.enqueue_trial({"x": i / len(values)})
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("noise", {"value": error**2})
        study.tell(trial, value)
    return study


def test_a_few_broken_models_do_not_hide_the_others_from_the_process():
    """A perplexity of 10^5 is known to be bad, and no more: the bowl around 12 is seen as without it."""
    cube, xs = UnitCube({"x": Float(0, 1)}), np.arange(20) / 20
    bowl = 12 + 6 * (xs - 0.4) ** 2
    exploded = np.where(xs > 0.8, 12 * np.exp(9.0), bowl)
    histories = [read_history(_told(list(v), list(0.01 * v)), cube) for v in (bowl, exploded)]
    whole, tamed = (h.objectives[0] for h in histories)
    assert tamed.values.min() > -12 - 100
    torch.testing.assert_close(tamed.values[:17], whole.values[:17], rtol=0, atol=0)
    with numerics(0):
        _, covariance = fit(tamed, make_kernel("tied", cube)).posterior(tamed.points[:17])
    assert float(covariance.diagonal().sqrt().max()) < 0.15  # the error of one measurement is 0.12


@pytest.mark.parametrize(("scale", "error"), [(1.0, 0.017), (1.0, 0.005), (5.0, 0.005)])
def test_ordinary_measurements_stay_as_they_are(scale: float, error: float):
    values = [scale * v for v in (0.2, 0.21, 0.2, 0.79, 0.8, 0.3, 0.78, 0.01)]
    found = read_history(_told(values, [scale * error] * len(values)), UnitCube({"x": Float(0, 1)})).objectives[0]
    assert (-found.values).tolist() == values


def test_numbers_without_noise_stay_as_they_are_however_far_apart():
    values = [0.010, 0.011, 0.012, 0.013, 5.0]
    found = read_history(_told(values, [0.0] * 5), UnitCube({"x": Float(0, 1)})).objectives[0]
    assert (-found.values).tolist() == values

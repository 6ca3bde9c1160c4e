"""The unit cube of a search space, and the Gaussian process over it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_search.errors import SpaceError
from merge_search.search.samplers import distributions
from merge_search.search.samplers.history import Quantity
from merge_search.search.samplers.kernels import depth_families, fit, make_kernel, resolve_kernel
from merge_search.search.samplers.numerics import numerics
from merge_search.search.samplers.unit_cube import UnitCube, holds
from merge_search.space import Categorical, Float, Integer, Parameter

MIXED: dict[str, Parameter] = {
    "preset": Categorical(("ties", "dare", "mean")),
    "coefficient.maths": Float(0.0, 1.5),
    "coefficient.code": Float(0.0, 1.5),
    "density.maths": Float(0.01, 1.0, log=True),
    "rank": Integer(1, 6),
    "steps": Integer(8, 64, log=True),
    "rescale": Categorical((True, False)),
    "fixed": Float(2.0, 2.0),
}


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
    NAMES = (
        "coefficient.a.block.10",
        "coefficient.a.block.2",
        "coefficient.a.block.0",
        "density.a",
        "coefficient.a.rest",
    )

    def test_families_are_in_order_of_depth_and_apart_by_expert_and_kind(self):
        names = [*self.NAMES, *(f"coefficient.b.block.{i}.{kind}" for i in range(3) for kind in ("mlp", "attention"))]
        assert depth_families(names) == [[2, 1, 0], [5, 7, 9], [6, 8, 10]]
        assert depth_families(["coefficient.a.block.0", "coefficient.a.block.1"]) == []

    def test_auto_is_structured_where_blocks_have_an_order(self):
        assert resolve_kernel("auto", UnitCube({n: Float(0, 1) for n in self.NAMES})) == "structured"
        assert resolve_kernel("auto", UnitCube(MIXED)) == "plain"
        assert resolve_kernel("plain", UnitCube({n: Float(0, 1) for n in self.NAMES})) == "plain"

    def test_structured_kernel_rates_an_even_change_of_all_blocks_above_an_uneven_one(self):
        cube = UnitCube({f"coefficient.a.block.{i}": Float(0, 1) for i in range(12)})
        kernel = make_kernel("structured", cube)
        centre = torch.full((1, 12), 0.5, dtype=torch.double)
        even = centre + 0.3
        uneven = centre + 0.3 * torch.tensor([1.0, -1.0] * 6, dtype=torch.double)
        with torch.no_grad():
            same, up, zigzag = (kernel(centre, x).to_dense().item() for x in (centre, even, uneven))
        assert up < zigzag < same

    def test_covariance_is_positive_definite(self):
        parameters = {**{n: Float(0, 1) for n in self.NAMES}, "preset": Categorical(("a", "b"))}
        cube = UnitCube(parameters)
        rng = np.random.default_rng(0)
        points = torch.tensor([cube.encode(random_point(parameters, rng)) for _ in range(20)], dtype=torch.double)
        with torch.no_grad():
            covariance = make_kernel("structured", cube)(points).to_dense()
        torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=1e-12)
        assert torch.linalg.eigvalsh(covariance).min() > 0

    def test_posterior_follows_the_measurements_as_far_as_their_noise_allows(self):
        """At one point measured 100 times the posterior is the mean, with the variance of the mean."""
        points = torch.full((100, 2), 0.5, dtype=torch.double)
        values = 0.3 + 0.1 * torch.tensor([1.0, -1.0] * 50, dtype=torch.double)
        quantity = Quantity(points, values, torch.full((100,), 0.01, dtype=torch.double))
        with numerics(0):
            mean, covariance = fit(
                quantity, make_kernel("plain", UnitCube({"x": Float(0, 1), "y": Float(0, 1)}))
            ).posterior(points[:1])
        assert mean.item() == pytest.approx(0.3, abs=1e-3)
        assert covariance.item() == pytest.approx(1e-4, rel=0.1)

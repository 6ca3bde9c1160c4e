"""Order statistics turn any density into a rule without another pass over the scores."""

import math

import pytest
import torch

from merge_search.engine.kernels.random_bits import indices
from merge_search.engine.kernels.ranks import row_ranks
from merge_search.engine.passes.order_statistics import EXACT_LIMIT, kept_count, order_statistics


def kept(scores: torch.Tensor, t, k: int) -> torch.Tensor:
    """The rule of the module's docstring, literally."""
    low, high, cut = t.cut(k)
    place = indices(scores.numel()) * t.stride
    return (scores >= high) | ((scores >= low) & (place <= cut))


@pytest.mark.parametrize(
    ("density", "n", "expected"), [(0.5, 8, 4), (0.2, 8, 2), (0.01, 8, 1), (1.0, 8, 8), (0.5, 0, 0)]
)
def test_kept_count_rounds_and_keeps_at_least_one(density, n, expected):
    assert kept_count(density, n) == expected


def test_ties_are_broken_by_lowest_index_in_small_tensors():
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 2.0])
    t = order_statistics(scores)
    assert kept(scores, t, 1).nonzero().flatten().tolist() == [1]
    assert kept(scores, t, 3).nonzero().flatten().tolist() == [0, 1, 5]
    assert kept(scores, t, 4).nonzero().flatten().tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("n", [1, 2, 97, 4001])
def test_small_tensors_keep_exactly_the_top_k(n):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(-5, 6, (n,), generator=generator).float()
    t = order_statistics(scores)
    for k in sorted({0, 1, n // 3, n - 1, n}):
        expected = torch.zeros(n, dtype=torch.bool)
        expected[torch.argsort(scores, descending=True, stable=True)[:k]] = True
        assert torch.equal(kept(scores, t, k), expected)


def test_large_smooth_scores_keep_the_share_asked_for_and_split_by_size():
    n = 2**18
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0)).abs()
    t = order_statistics(scores)
    for density in (0.001, 0.1, 0.5, 0.9, 0.999):
        mask = kept(scores, t, kept_count(density, n))
        assert abs(int(mask.sum()) - density * n) < 1e-4 * n
        assert scores[mask].min() > scores[~mask].max() * (1 - 2**-10)


@pytest.mark.parametrize("levels", [1, 2, 16])
def test_large_tensors_full_of_ties_keep_the_share_spread_over_the_tensor(levels):
    n = 2**20
    scores = torch.randint(1, levels + 1, (n,), generator=torch.Generator().manual_seed(1)).float() / 128
    t = order_statistics(scores)
    for density in (0.07, 0.5, 0.93):
        mask = kept(scores, t, kept_count(density, n))
        assert abs(int(mask.sum()) - density * n) < 4e-4 * n
        quarters = mask.view(4, -1).double().mean(1)
        assert (quarters - density).abs().max() < 2e-3


@pytest.mark.parametrize("n", [1000, 2**17])
def test_masks_are_nested_in_k(n):
    scores = torch.randint(0, 20, (n,), generator=torch.Generator().manual_seed(2)).float()
    t = order_statistics(scores)
    before = torch.zeros(n, dtype=torch.bool)
    for k in range(0, n + 1, n // 10):
        now = kept(scores, t, k)
        assert bool((now | ~before).all())
        before = now


@pytest.mark.parametrize("n", [1000, 2**17])
def test_negative_scores_and_zeros_are_ordered_too(n):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(3))
    scores[::7] = -0.0
    t = order_statistics(scores)
    positive = int((scores > 0).sum())
    assert t.n_positive == positive
    assert torch.equal(kept(scores, t, positive), scores > 0)
    assert t.maximum == float(scores.max())


def test_value_is_the_kth_largest_score():
    scores = torch.randn(2**17, generator=torch.Generator().manual_seed(4)).abs()
    ordered = torch.sort(scores, descending=True).values
    t = order_statistics(scores)
    for k in (1, 100, 2**16, 2**17):
        assert t.value(k) == pytest.approx(float(ordered[k - 1]), rel=2**-10)
    small = order_statistics(scores[:100])
    assert small.value(10) == float(torch.sort(scores[:100], descending=True).values[9])


def test_several_tensors_are_ranked_together():
    a, b = torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])
    t = order_statistics([a, b])
    assert t.cut(3).low == 2.0
    large = [torch.randn(EXACT_LIMIT, generator=torch.Generator().manual_seed(i)).abs() for i in (0, 1)]
    assert order_statistics(large).value(1000) == pytest.approx(
        float(torch.sort(torch.cat(large)).values[-1000]), rel=2**-10
    )


@pytest.mark.parametrize("n", [64, 2**17])
def test_mass_keeps_the_fewest_scores_that_reach_the_share(n):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(5))
    ordered = torch.sort(scores.double(), descending=True).values.cumsum(0)
    expected = int((ordered < 0.5 * ordered[-1]).sum()) + 1
    assert order_statistics(scores).count_for_mass(0.5) == pytest.approx(expected, abs=1 + 1e-3 * n * (n > 1000))


@pytest.mark.parametrize("n", [64, 2**17])
def test_kappa_makes_the_mean_probability_the_density(n):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(6)) ** 4
    t = order_statistics(scores)
    for density in (0.01, 0.3, 0.8):
        assert float((t.kappa(density) * scores).clamp(max=1).double().mean()) == pytest.approx(density, rel=1e-3)
    assert order_statistics(torch.tensor([0.0, 0.0, 1.0])).kappa(0.9) > 1e38


def test_row_ranks_start_anew_in_each_row_and_break_ties_by_index():
    assert row_ranks(torch.tensor([[1.0, 3.0, 3.0], [5.0, 4.0, 6.0]])).tolist() == [[2, 0, 1], [1, 2, 0]]
    assert row_ranks(torch.tensor(2.0)).tolist() == 0


def test_an_empty_tensor_keeps_nothing():
    t = order_statistics(torch.zeros(0))
    assert t.n == 0
    assert t.cut(kept_count(0.5, 0)) == (math.inf, math.inf, -(2**31))

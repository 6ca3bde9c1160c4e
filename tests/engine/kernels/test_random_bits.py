"""Counter-based random numbers are a pure function of seed, expert, tensor and element."""

import pytest
import torch

from merge_search.engine.kernels.random_bits import draw, draw_limit, indices, mask_keys, mix, uniform


def lowbias_by_hand(index: int, first: int, second: int) -> int:
    """The same arithmetic with Python's unbounded integers modulo 2**32."""
    h = (index + first) % 2**32
    h ^= h >> 16
    h = (h * 0x7FEB352D % 2**32) ^ (second % 2**32)
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    h ^= h >> 16
    return h if h < 2**31 else h - 2**32


def test_bits_equal_integer_arithmetic_modulo_two_to_the_32():
    keys = mask_keys(7, "math", "model.w")
    index = torch.tensor([0, 1, 2, 12345, 2**31 - 1, -(2**31), -1], dtype=torch.int32)
    expected = [lowbias_by_hand(int(i), *keys) for i in index]
    assert mix(index, *keys).tolist() == expected


def test_numbers_do_not_depend_on_chunks():
    keys = mask_keys(0, "a", "w")
    whole = uniform(indices(1000), *keys)
    parts = [uniform(indices(n, start), *keys) for start, n in ((0, 1), (1, 499), (500, 500))]
    assert torch.equal(whole, torch.cat(parts))


def test_an_offset_may_be_a_tensor_and_may_pass_two_to_the_31():
    assert indices(3, 2**31 - 1).tolist() == [2**31 - 1, -(2**31), -(2**31) + 1]
    assert torch.equal(indices(4, torch.tensor(5, dtype=torch.int32)), indices(4, 5))


def test_moments_are_those_of_the_uniform_distribution():
    n = 2**20
    u = uniform(indices(n), *mask_keys(3, "a", "w")).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5


def test_pairs_of_neighbours_fill_the_square_evenly():
    n, cells = 2**20, 32
    u = (uniform(indices(n), *mask_keys(1, "a", "w")) * cells).long()
    counts = torch.bincount(u[:-1] * cells + u[1:], minlength=cells**2).double()
    expected = (n - 1) / cells**2
    chi_square = ((counts - expected) ** 2 / expected).sum() / (cells**2 - 1)
    assert abs(chi_square - 1) < 5 * (2 / cells**2) ** 0.5


def test_experts_tensors_and_seeds_are_uncorrelated():
    n = 2**16
    streams = [(s, e, t) for s in (0, 1) for e in ("a", "b", "c") for t in ("x", "y", "z", "layers.10", "layers.11")]
    u = torch.stack([uniform(indices(n), *mask_keys(*stream)) for stream in streams]).double()
    correlation = torch.corrcoef(u) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("probability", [2**-24, 0.1, 1 / 3, 0.5, 1 - 2**-24, 1.0])
def test_whole_numbers_decide_as_the_uniform_numbers_do(probability):
    index, keys = indices(10000), mask_keys(0, "a", "w")
    assert torch.equal(draw(index, *keys) < draw_limit(probability), uniform(index, *keys).double() < probability)


def test_masks_are_nested_in_the_density_and_hit_it():
    d = draw(indices(2**18), *mask_keys(0, "a", "w"))
    small, large = d < draw_limit(0.2), d < draw_limit(0.6)
    assert bool((large | ~small).all())
    assert abs(small.double().mean() - 0.2) < 5 * (0.16 / 2**18) ** 0.5

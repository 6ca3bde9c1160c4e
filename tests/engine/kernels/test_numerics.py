"""Functions made of the four operations."""

from __future__ import annotations

import torch

from merge_search.engine.kernels.numerics import exp, log, sigmoid, tanh


def test_tanh_is_within_a_millionth_of_the_true_value_everywhere():
    small = 10.0 ** torch.linspace(-37, 2, 40001, dtype=torch.float64)
    x = torch.cat([small, torch.linspace(0, 12, 100001, dtype=torch.float64)]).float()
    true = torch.tanh(x.double())
    for sign in (1.0, -1.0):
        error = (tanh(sign * x).double() - sign * true).abs() / true.clamp(min=1e-300)
        assert float(error[true > 0].max()) < 1e-6


def test_tanh_keeps_zero_infinity_and_nan():
    found = tanh(torch.tensor([0.0, torch.inf, -torch.inf, torch.nan]))
    assert float(found[0]) == 0.0
    assert torch.allclose(found[1:3], torch.tensor([1.0, -1.0]), rtol=0, atol=1e-6)
    assert bool(torch.isnan(found[3]))


def test_tanh_is_odd_and_never_leaves_its_range():
    x = torch.linspace(-20, 20, 200001)
    assert torch.equal(tanh(-x), -tanh(x))
    assert 1 - 1e-6 < float(tanh(x).abs().max()) <= 1.0


def test_exp_and_sigmoid_are_within_their_bounds():
    x = torch.linspace(-87, 88.6, 200001)
    assert float((exp(x).double() / x.double().exp() - 1).abs().max()) < 3e-7
    assert float((sigmoid(x).double() / x.double().sigmoid() - 1).abs().max()) < 1e-6
    ends = exp(torch.tensor([-torch.inf, -1e30, 0.0, 89.0, torch.inf]))
    assert ends.tolist() == [0.0, 0.0, 1.0, torch.inf, torch.inf]
    assert bool(torch.isnan(exp(torch.tensor(torch.nan))))


def test_log_is_within_its_bound_from_the_smallest_number_to_the_largest():
    x = torch.cat([2.0 ** torch.linspace(-149, 127.9, 200001), torch.linspace(0.5, 2, 100001)])
    true = x.double().log()
    assert float(((log(x).double() - true).abs() / true.abs().clamp(min=1)).max()) < 2e-7
    assert log(torch.tensor([0.0, 1.0, torch.inf])).tolist() == [-torch.inf, 0.0, torch.inf]

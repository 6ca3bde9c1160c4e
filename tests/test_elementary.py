"""Functions made of the four operations."""

from __future__ import annotations

import torch

from merge_search.engine.elementary import tanh


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

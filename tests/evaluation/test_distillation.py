"""Distributions of an expert, kept small, and the divergence from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluators.distillation import TOP, TeacherOutputs, divergence, join


def drawn(n: int, n_outcomes: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, n_outcomes, generator=draw, dtype=torch.float64)).log_softmax(1)


def test_the_divergence_of_two_coins_is_the_one_worked_out_by_hand() -> None:
    outputs = TeacherOutputs.from_log_p(torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64).log())
    found = divergence(outputs, torch.tensor([[0.25, 0.75], [0.75, 0.25]], dtype=torch.float64).log())
    assert found.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0], abs=1e-6)


def test_all_but_the_likeliest_outcomes_count_as_one() -> None:
    outputs = TeacherOutputs.from_log_p(torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log(), top=2)
    assert outputs.outcomes is not None
    assert outputs.outcomes.tolist() == [[0, 1]]
    found = divergence(outputs, torch.tensor([[0.2, 0.3, 0.4, 0.1]], dtype=torch.float64).log())
    assert found.item() == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.2 * math.log(0.2 / 0.5), abs=1e-3)


@given(
    st.integers(0, 10_000), st.integers(2, 90), st.sampled_from([None, 1, 5, TOP]), st.sampled_from([0.1, 3.0, 30.0])
)
def test_it_is_zero_at_the_expert_and_never_negative_nor_above_the_whole(
    seed: int, n_outcomes: int, top: int | None, scale: float
) -> None:
    p, q = drawn(4, n_outcomes, seed, scale), drawn(4, n_outcomes, seed + 1, scale)
    outputs = TeacherOutputs.from_log_p(p, top=top)
    assert divergence(outputs, p).abs().max() < 2e-4
    found, whole = divergence(outputs, q), (p.exp() * (p - q)).sum(1)
    assert (found > -1e-9).all()
    assert (found < whole * 1.002 + 1e-3).all()


@pytest.mark.parametrize("top", [None, 4])
def test_its_gradient_is_that_of_finite_differences_and_vanishes_at_the_expert(top: int | None) -> None:
    outputs, logits = TeacherOutputs.from_log_p(drawn(3, 9, 1), top=top), drawn(3, 9, 2).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: divergence(outputs, x.log_softmax(1)), (logits,))
    at = drawn(3, 9, 1).requires_grad_(True)
    divergence(outputs, at.log_softmax(1)).sum().backward()
    assert at.grad is not None
    assert at.grad.abs().max() < 1e-3


def test_questions_with_fewer_choices_stand_beside_longer_ones() -> None:
    two, three = drawn(1, 2, 1), drawn(1, 3, 2)
    outputs = join([TeacherOutputs.from_log_p(two), TeacherOutputs.from_log_p(three)])
    assert outputs.log_p.shape == (2, 3)
    other = torch.full((2, 3), -torch.inf, dtype=torch.float64)
    other[0, :2], other[1] = drawn(1, 2, 3), drawn(1, 3, 4)
    other.requires_grad_(True)
    found = divergence(outputs, other)
    assert found[0].item() == pytest.approx(divergence(TeacherOutputs.from_log_p(two), drawn(1, 2, 3)).item(), rel=1e-9)
    found.sum().backward()
    assert other.grad is not None
    assert torch.isfinite(other.grad).all()


def test_a_long_vocabulary_is_kept_in_six_bytes_per_outcome() -> None:
    outputs = TeacherOutputs.from_log_p(drawn(10, 5000, 3), top=TOP)
    assert outputs.outcomes is not None
    assert outputs.log_p.nbytes + outputs.outcomes.nbytes == 10 * (6 * TOP + 2)
    assert np.exp(outputs.log_p.astype(np.float64)).sum(1) == pytest.approx(np.ones(10), abs=5e-3)

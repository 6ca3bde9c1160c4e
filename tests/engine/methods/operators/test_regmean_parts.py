"""RegMean in parts: its formula, its limits, and what it does where there are no Gram matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from operator_runs import grams, near, random_deltas, run, total
from torch import Tensor

from merge_search.errors import NotMeasuredError, RecipeError

N, OUT, IN = 3, 5, 7
Statistic = Callable[[str, str], Tensor]


def parts(deltas: list[Tensor], statistic: Statistic, **options: Any) -> list[Tensor]:
    return run("regmean_parts", deltas, statistic=statistic, options=options)


def by_hand(deltas: list[Tensor], statistic: Statistic, weights: np.ndarray, ridge: float, p: float) -> np.ndarray:
    """The docstring's formulas on vectors: each expert's outputs as rows of one least-squares problem."""
    d = [np.asarray(x, dtype=np.float64) for x in deltas]
    g = [np.asarray(statistic("prompt_gram", f"e{i}"), dtype=np.float64) for i in range(len(d))]
    roots = [np.linalg.cholesky(w * x) for w, x in zip(weights, g, strict=True)]
    a = np.stack([np.concatenate([(x @ root).ravel() for root in roots]) for x in d], axis=1)
    wanted = np.concatenate([(x @ root).ravel() for x, root in zip(d, roots, strict=True)])
    pull = 0.01 * np.trace(a.T @ a) / len(d)
    lam = np.linalg.solve(a.T @ a + pull * np.eye(len(d)), a.T @ wanted + pull / len(d))
    s = sum(w * x for w, x in zip(weights, g, strict=True))
    r = ridge * np.mean(np.diag(s))
    inverse = np.linalg.inv(s + r * np.eye(len(s)))
    out = np.stack([(w * x @ y + r * c * x) @ inverse for w, x, y, c in zip(weights, d, g, lam, strict=True)])
    reached = [np.trace(out.sum(0) @ y @ x.T) / np.trace(x @ y @ x.T) for x, y in zip(d, g, strict=True)]
    return out * np.mean(reached) ** -p


@pytest.mark.parametrize("weights", ["outputs", "inputs", "equal"])
@pytest.mark.parametrize("p", [0.0, 0.75])
def test_parts_follow_the_formula(weights: str, p: float) -> None:
    deltas, statistic = random_deltas(N, (OUT, IN)), grams(N, IN)
    deltas = [(i + 1) * d for i, d in enumerate(deltas)]
    g = [statistic("prompt_gram", f"e{i}") for i in range(N)]
    w = {
        "outputs": [1 / float(torch.trace(d @ x @ d.T)) for d, x in zip(deltas, g, strict=True)],
        "inputs": [1 / float(x.diagonal().mean()) for x in g],
        "equal": [1.0] * N,
    }[weights]
    found = parts(deltas, statistic, weights=weights, ridge=0.3, gain=p)
    for part, wanted in zip(found, by_hand(deltas, statistic, np.array(w), 0.3, p), strict=True):
        near(part, torch.tensor(wanted), atol=1e-6)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_one_expert_and_equal_experts_come_out_whole(p: float) -> None:
    delta = random_deltas(1, (OUT, IN))[0]
    near(parts([delta], grams(1, IN), gain=p)[0], delta)
    near(total(parts([delta] * 3, grams(3, IN), gain=p)), delta)


def test_experts_whose_prompts_use_different_inputs_all_keep_their_outputs() -> None:
    deltas, half = random_deltas(2, (OUT, 4)), torch.tensor([1.0, 1.0, 0.0, 0.0])
    seen = {"e0": torch.diag(half), "e1": 9 * torch.diag(1 - half)}
    merged = total(parts(deltas, lambda kind, expert: seen[expert], ridge=0.0))
    near(merged[:, :2], deltas[0][:, :2])
    near(merged[:, 2:], deltas[1][:, 2:])


def test_an_input_that_no_prompt_uses_gets_the_layers_coefficients() -> None:
    """Both experts want coefficient 1/2 of the other's change, whatever the weights: lam is 1/2 by symmetry."""
    deltas = [torch.tensor([[1.0, 0.0, 4.0]]), torch.tensor([[0.0, 1.0, 8.0]])]
    seen = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    near(total(parts(deltas, lambda kind, expert: seen))[0, 2], torch.tensor(6.0))


def test_the_longer_change_does_not_drown_the_shorter_one() -> None:
    """Outputs of the short expert are missed by less than its change. Where all count alike, by many times that."""
    short, long = random_deltas(2, (OUT, IN))
    statistic = grams(2, IN)
    missed = {}
    for weights in ("outputs", "equal"):
        off = total(parts([short, 100 * long], statistic, weights=weights)) - short
        change = torch.trace(short @ statistic("", "e0") @ short.T)
        missed[weights] = float(torch.trace(off @ statistic("", "e0") @ off.T) / change)
    assert missed["outputs"] < 1
    assert missed["equal"] > 10


def test_gram_matrices_of_another_size_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"of tensor 'w' must have shape \(7, 7\), or \(5, 1\).*found \(4, 4\)"):
        parts(random_deltas(2, (OUT, IN)), lambda kind, expert: torch.eye(4))


def test_the_whole_gain_makes_the_mean_gain_along_the_experts_changes_one() -> None:
    deltas, statistic = random_deltas(N, (OUT, IN)), grams(N, IN)

    def mean_gain(merged: Tensor) -> float:
        g = [statistic("prompt_gram", f"e{i}") for i in range(N)]
        reached = [torch.trace(merged @ x @ d.T) / torch.trace(d @ x @ d.T) for d, x in zip(deltas, g, strict=True)]
        return float(torch.stack(reached).mean())

    before = mean_gain(total(parts(deltas, statistic)))
    assert before < 0.9
    assert mean_gain(total(parts(deltas, statistic, gain=1.0))) == pytest.approx(1.0, abs=1e-5)
    assert mean_gain(total(parts(deltas, statistic, gain=0.5))) == pytest.approx(before**0.5, abs=1e-5)


def test_rows_of_an_embedding_are_weighted_by_the_tokens_that_look_them_up() -> None:
    """Row 0: only the first expert's prompts have the token. Row 1: both, and shares 1/4 over energies 4 and 1 give
    weights of 1 to 4. Row 2: none."""
    deltas = [torch.tensor([[2.0], [2.0], [2.0]]), torch.tensor([[1.0], [1.0], [4.0]])]
    seen = {"e0": torch.tensor([[0.75], [0.25], [0.0]]), "e1": torch.tensor([[0.0], [0.25], [0.0]])}
    energies = {"e0": 4.0, "e1": 0.25}
    found = total(parts(deltas, lambda kind, expert: seen[expert]))
    w = [0.25 / energies["e0"], 0.25 / energies["e1"]]
    near(found, torch.tensor([[2.0], [(2 * w[0] + 1 * w[1]) / sum(w)], [3.0]]))


def test_vectors_and_what_no_prompt_reaches_are_the_mean_by_their_own_length() -> None:
    def missing(kind: str, expert: str) -> Tensor:
        raise NotMeasuredError("not measured")

    for shape in ((6,), (4, 6), (2, 4, 6)):
        deltas = random_deltas(2, shape)
        w = [1 / float(d.square().sum()) for d in deltas]
        wanted = sum(x * d for x, d in zip(w, deltas, strict=True)) / sum(w)
        near(total(parts(deltas, missing)), wanted)


def test_an_expert_that_did_not_change_the_tensor_has_no_say() -> None:
    delta, zero = random_deltas(1, (OUT, IN))[0], torch.zeros(OUT, IN)
    found = parts([zero, delta], grams(2, IN))
    near(found[1], delta)
    assert not found[0].any()


def test_the_number_of_prompts_is_part_of_what_is_asked_for() -> None:
    asked = []

    def statistic(kind: str, expert: str) -> Tensor:
        asked.append((kind, expert))
        return torch.eye(IN)

    parts(random_deltas(2, (OUT, IN)), statistic, prompts=16)
    assert asked == [("prompt_gram@prompts=16", "e0"), ("prompt_gram@prompts=16", "e1")]

"""Scores of measures by hand, one measure after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_search.engine.methods.assess import AssessContext, variance
from merge_search.engine.methods.assess.fisher import interpolated
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.errors import RecipeError
from merge_search.recipe import Group
from merge_search.rules import MEASURES
from merge_search.rules.table import load


def scores(
    name: str,
    *deltas: Any,
    options: Mapping[str, Any] | None = None,
    measured: Mapping[str, Sequence[Any]] | None = None,
    tensor: str = "w",
    **fields: Any,
) -> list[Tensor]:
    """Scores of every expert; `measured` has each expert's statistic by its kind."""
    taus = [torch.tensor(d) for d in deltas]
    names = tuple("abc"[: len(taus)])
    kinds = (measured or {}).items()
    statistics = {
        (kind, e, tensor): torch.tensor(v) for kind, values in kinds for e, v in zip(names, values, strict=True)
    }
    base = torch.zeros_like(taus[0])
    tensors = MemoryTensors(
        {tensor: base}, {e: {tensor: t} for e, t in zip(names, taus, strict=True)}, statistics=statistics
    )
    context = AssessContext(
        base, taus, taus, fields.pop("numbers", ()), MEASURES[name].completed(options or {}), len(taus), names, names,
        Group(tensor, 0, "mlp"), tensors=tensors, **fields,
    )  # fmt: skip
    return list(load(MEASURES[name])(context))


def same(found: Sequence[Tensor], *wanted: Any) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, torch.tensor(other), rtol=1e-6, atol=1e-7)


def test_ranks_run_from_zero_for_the_smallest_of_a_row_to_one() -> None:
    same(scores("rank", [[0.1, -0.3, 0.2], [5.0, 4.0, -6.0]]), [[0.0, 1.0, 0.5], [0.5, 0.0, 1.0]])
    same(scores("rank", [[2.0], [-3.0]]), [[1.0], [1.0]])


def test_energy_is_the_mean_square_also_where_squares_are_too_large_for_float32() -> None:
    same(scores("energy", [3.0, -4.0]), 12.5)
    same(scores("energy", [1e20] + [0.0] * 100), 1e40 / 101)


def test_tall_ratio_is_the_size_beside_the_sum_of_the_others() -> None:
    found = scores("tall_ratio", [1.0, -2.0, 0.0, 1.0], [-2.0, 1.0, 0.0, 0.0])
    same(found, [0.5, 2.0, 0.0, math.inf], [2.0, 0.5, 0.0, 0.0])
    same(scores("tall_ratio", [1.0], [2.0], [-4.0]), [0.5], [2 / 3], [4 / 3])


def test_products_with_what_was_measured_are_sizes() -> None:
    same(scores("gradient_product", [1.0, -2.0], measured={"gradient": [[-3.0, 5.0]]}), [3.0, 10.0])
    norms = [[[2.0, 3.0]]]
    same(
        scores("activation_norm", [[1.0, -2.0], [-3.0, 0.0]], measured={"activation_norm": norms}),
        [[2.0, 6.0], [6.0, 0.0]],
    )


def test_trust_region_adds_up_the_pairs_of_different_experts() -> None:
    """|3| |-2| + |-5| |1| = 11; without data |1| |-2| twice."""
    gradients = {"absolute_gradient": [[3.0], [-5.0]]}
    same(scores("trust_region", [1.0], [-2.0], measured=gradients), [11.0], [11.0])
    same(scores("trust_region", [1.0], [-2.0], options={"zero_shot": True}), [4.0], [4.0])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"floor": 0.0}, [3.0, 4.0]),
        ({"floor": 0.5}, [3.5, 4.5]),
        ({"floor": 0.0, "power": 2.0}, [9.0, 16.0]),
        ({"floor": 0.0, "power": 0.5}, [3.0**0.5, 2.0]),
        ({"floor": 0.25, "normalise": True}, [0.85, 1.05]),
    ],
)
def test_fisher_is_a_power_beside_its_norm_above_its_floor(options: Mapping[str, Any], wanted: list[float]) -> None:
    same(scores("fisher", [1.0, 1.0], options=options, measured={"fisher": [[3.0, 4.0]]}), wanted)


def test_fisher_of_zeros_is_the_floor_and_never_below_it() -> None:
    options = {"floor": 1e-6, "normalise": True}
    same(scores("fisher", [1.0, 1.0], options=options, measured={"fisher": [[0.0, 0.0]]}), [1e-6, 1e-6])
    draw = torch.Generator().manual_seed(0)
    ends = [1e-9 * torch.rand(1000, generator=draw) for _ in range(2)]
    assert float(interpolated(ends, [0.3, 0.7], 1e-3).min()) >= 0.0


@pytest.mark.parametrize(("n_experts", "wanted"), [(2, 1.0), (3, 14 / 9), (4, 1.5)])
def test_variance_counts_the_experts_that_did_not_change_the_tensor(n_experts: int, wanted: float) -> None:
    """1 and 3, then with one and two zeros beside them."""
    numbers = [torch.tensor(v) for v in variance.numbers({}, (), n_experts, 2)]
    same(scores("variance", [1.0], [3.0], numbers=numbers), [wanted], [wanted])


@pytest.mark.parametrize(("average", "wanted"), [("loss", 0.5), ("rows", 0.75)])
def test_a_causal_effect_is_the_size_of_the_change_or_the_mean_size_over_the_rows(average: str, wanted: float) -> None:
    kind = "effect@form=gradient,partition=block"
    same(scores("causal_effect", [1.0], options={"average": average}, measured={kind: [[-0.5, 0.75]]}), wanted)


def test_external_scores_are_taken_as_they_are_and_need_the_tensors_shape() -> None:
    options = {"name": "mine"}
    same(scores("external", [1.0, 2.0], options=options, measured={"mine": [[-7.0, 8.0]]}), [-7.0, 8.0])
    with pytest.raises(
        RecipeError, match=r"external scores of expert 'a' for 'w' have shape \(1,\), the tensor \(2,\)"
    ):
        scores("external", [1.0, 2.0], options=options, measured={"mine": [[7.0]]})


def test_random_scores_depend_on_seed_expert_and_tensor_and_on_no_weight() -> None:
    zeros, ones = [0.0] * 50, [1.0] * 50
    first, second = scores("random", zeros, zeros, seed=1)
    assert not torch.equal(first, second)
    assert torch.equal(first, scores("random", ones, zeros, seed=1)[0])
    assert not torch.equal(first, scores("random", zeros, seed=2)[0])
    assert not torch.equal(first, scores("random", zeros, seed=1, tensor="v")[0])
    assert 0.0 <= float(first.min()) < 0.2 < 0.8 < float(first.max()) < 1.0

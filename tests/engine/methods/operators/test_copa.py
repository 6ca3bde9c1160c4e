"""CoPA / RobustMerge: values by hand on two pairs of rank 2, and what does not depend on how a pair is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_runs import near, run, total
from torch import Tensor

from merge_search.engine.contracts import Factors
from merge_search.errors import RecipeError

A_1 = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 1.0]])  # a third kept: 4 and 2, so s = 5/4, 4/2
A_2 = torch.tensor([[0.0, 3.0, 3.0], [0.0, 0.0, 6.0]])  # 6 and the first 3, so s = 6/3, 6/6
B_1 = torch.tensor([[13.0, 0.0], [1.0, 0.0], [0.0, 3.0]])  # 13 and 3
B_2 = torch.tensor([[0.0, 0.0], [26.0, -1.0], [0.0, 6.0]])  # 26 and 6
TWO = [Factors(B_1, A_1), Factors(B_2, A_2)]


def copa(pairs: list[Factors], density: float = 1 / 3, **options: Any) -> list[Tensor]:
    """Parts of one expert per pair, with strength 1 unless the options say more."""
    given = {f"e{i}": f for i, f in enumerate(pairs)}
    deltas = [f.delta() for f in pairs]
    options = {"strength": 1.0, **options}
    parts: list[Tensor] = run(
        "copa", deltas, densities=(density,) * len(pairs), factors=given.get, options=options,
        transposed=pairs[0].transpose,
    )  # fmt: skip
    return parts


def test_pairs_are_pruned_rescaled_balanced_and_multiplied_as_sums() -> None:
    """sum A~ = [4 3 0; 0 2 6]; S~ = (5/13, 2/3) and (8/13, 1/3)."""
    one, two = copa(TWO)
    near(one, [[20, 15, 0], [0, 0, 0], [0, 4, 12]])
    near(two, [[0, 0, 0], [64, 48, 0], [0, 4, 12]])
    near(total(copa(TWO, strength=2.0)), 2 * (one + two))


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"cross": False}, [[20, 0, 0], [0, 0, 0], [0, 4, 0]], [[0, 0, 0], [0, 48, 0], [0, 0, 12]]),
        ({"normalise": False}, [[65, 48.75, 0], [0, 0, 0], [0, 12, 36]], [[0, 0, 0], [208, 156, 0], [0, 12, 36]]),
        ({"rescale": False}, [[26, 19.5, 0], [0, 0, 0], [0, 3, 9]], [[0, 0, 0], [52, 39, 0], [0, 6, 18]]),
        # the larger of two scales for both ranks, 2 in either expert
        ({"clip": 0.5}, [[26, 19.5, 0], [0, 0, 0], [0, 3, 9]], [[0, 0, 0], [52, 39, 0], [0, 6, 18]]),
        # B whole
        ({"prune": "a"}, [[20, 15, 0], [20 / 13, 15 / 13, 0], [0, 4, 12]], [[0] * 3, [64, 142 / 3, -2], [0, 4, 12]]),
        # A whole, so that nothing is lost and both scales are 1
        ({"prune": "b"}, [[26, 26, 19.5], [0] * 3, [1.5, 3, 10.5]], [[0] * 3, [52, 52, 39], [3, 6, 21]]),
    ],
    ids=["own A", "not normalised", "not rescaled", "clipped", "A pruned", "B pruned"],
)  # fmt: skip
def test_options(options: dict[str, Any], first: list[list[float]], second: list[list[float]]) -> None:
    one, two = copa(TWO, **options)
    near(one, first)
    near(two, second)


def test_ranks_that_an_adapter_lacks_are_zeros_with_scale_one() -> None:
    one, two = copa([TWO[0], Factors(B_2[:, :1], A_2[:1])])
    near(one, [[20, 15, 0], [0, 0, 0], [0, 4, 0]])
    near(two, [[0, 0, 0], [64, 48, 0], [0, 0, 0]])


def test_a_rank_that_pruning_emptied_has_scale_one() -> None:
    emptied = Factors(torch.eye(2), torch.tensor([[9.0, 9.0], [1.0, 1.0]]))
    (part,) = copa([emptied], 0.5, normalise=False, prune="a")
    near(part, [[9, 9], [0, 0]])
    whole = Factors(torch.eye(2), torch.tensor([[8.0, 0.0], [8.0, 0.0]]))
    one, _ = copa([emptied, whole], 0.5, normalise=False, prune="a")
    near(one, [[17, 9], [8, 0]])  # by that scale, what the other expert has there


def test_one_expert_whole_is_that_expert() -> None:
    for options in ({}, {"cross": False}, {"gauge": "svd"}, {"gauge": "balanced"}, {"clip": 0.8}):
        near(copa(TWO[:1], 1.0, **options)[0], B_1 @ A_1, atol=1e-4)


def test_coefficients_and_an_inactive_expert_count_where_they_should() -> None:
    nothing = Factors(torch.zeros(3, 2), A_2)
    one, none = copa([TWO[0], nothing])
    near(one, copa(TWO[:1])[0])
    assert not none.any()


def test_a_tensor_that_an_expert_changed_without_a_pair_is_averaged() -> None:
    deltas = [f.delta() for f in TWO]
    parts = run("copa", deltas, factors={"e0": TWO[0]}.get, densities=(0.1, 0.1))
    for part, delta in zip(parts, deltas, strict=True):
        near(part, delta / 2)


def test_tensors_stored_in_by_out_get_the_transposed_part() -> None:
    turned = [f._replace(transpose=True) for f in TWO]
    for part, other in zip(copa(turned), copa(TWO), strict=True):
        near(part, other.T)


@pytest.mark.parametrize("gauge", ["stored", "svd"])
def test_only_the_svd_gauge_forgets_how_a_pair_was_written(gauge: str) -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [Factors(torch.randn(7, 3, generator=draw), torch.randn(3, 9, generator=draw)) for _ in range(2)]
    mixing = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 0.5], [1.0, 0.0, 2.0]])
    mixed = [Factors(f.b @ torch.linalg.inv(mixing), mixing @ f.a) for f in pairs]
    plain, other = (total(copa(given, 0.4, gauge=gauge)) for given in (pairs, mixed))
    assert torch.allclose(plain, other, atol=1e-4) == (gauge == "svd")


@pytest.mark.parametrize("gauge", ["stored", "balanced"])
def test_the_balanced_gauge_forgets_the_size_of_either_factor(gauge: str) -> None:
    sized = [Factors(B_1 * 8, A_1 / 8), TWO[1]]
    assert torch.allclose(total(copa(TWO, gauge=gauge)), total(copa(sized, gauge=gauge)), atol=1e-3) == (
        gauge == "balanced"
    )


def test_the_number_of_kept_entries_is_rounded() -> None:
    """0.6 x 3 entries are 2, and s = 6/5."""
    (part,) = copa([Factors(torch.ones(1, 1), torch.tensor([[3.0, 2.0, 1.0]]))], 0.6, normalise=False, prune="a")
    near(part, [[3.6, 2.4, 0]])


def test_the_smallest_density_keeps_one_entry_of_each_factor() -> None:
    (part,) = copa(TWO[:1], 0.01, normalise=False)
    near(part, [[13 * 5 / 4 * 4, 0, 0], [0, 0, 0], [0, 0, 0]])  # s = 5/4


def test_a_clip_outside_its_bounds_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"clip must be in \[0, 1\), got 1"):
        copa(TWO, clip=1.0)

"""Core Space: rules on singular values give on the cores of LoRA pairs what they give on the whole matrices."""

from __future__ import annotations

import pytest
import torch
from operator_runs import near, run, total

from merge_search.engine.contracts import Factors


def drawn(ranks: tuple[int, ...], shape: tuple[int, int] = (40, 30)) -> list[Factors]:
    draw = torch.Generator().manual_seed(0)
    return [Factors(torch.randn(shape[0], r, generator=draw), torch.randn(r, shape[1], generator=draw)) for r in ranks]


@pytest.mark.parametrize("rule", ["tsv_m", "iso_c"])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_rule_in_the_core_is_the_rule_on_the_matrices(rule: str, transpose: bool) -> None:
    pairs = [f._replace(transpose=transpose) for f in drawn((3, 3, 3))]
    deltas = [f.delta() for f in pairs]
    names = {f"e{i}": f for i, f in enumerate(pairs)}
    found = run("core", deltas, factors=names.get, transposed=transpose, options={"rule": rule})
    whole = run(rule, deltas, transposed=transpose)
    for part, wanted in zip(found, whole, strict=True):
        near(part, wanted, atol=2e-4)


def test_iso_cts_in_the_core_is_as_wide_as_the_ranks_together_and_has_a_flat_spectrum() -> None:
    pairs = drawn((3, 2))
    names = {f"e{i}": f for i, f in enumerate(pairs)}
    merged = total(run("core", [f.delta() for f in pairs], factors=names.get, options={"rule": "iso_cts"}))
    values = torch.linalg.svdvals(merged)
    near(values[:5], values[:1].expand(5), atol=1e-3)
    assert float(values[5]) < 1e-3 * float(values[0])


def test_a_tensor_that_an_expert_changed_without_a_pair_is_averaged() -> None:
    pairs = drawn((3, 3))
    deltas = [f.delta() for f in pairs]
    for part, delta in zip(run("core", deltas, factors={"e0": pairs[0]}.get), deltas, strict=True):
        near(part, delta / 2)

"""Ranks and histograms made in C are those of torch's sort and of its bincount."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from merge_search.engine.codegen import compiler
from merge_search.engine.kernels import ranks
from merge_search.engine.passes.order_statistics import EXACT_LIMIT, OrderStatisticsBuilder, order_statistics

needs_compiler = pytest.mark.skipif(compiler.find_compiler() is None, reason="needs a C++ compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loops of this run's own, looked for anew in every test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "ranks"))
    ranks._loaded.cache_clear()
    yield
    ranks._loaded.cache_clear()


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    ranks._loaded.cache_clear()


def expected(scores: Tensor) -> Tensor:
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1)


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize("shape", [(1,), (6, 1), (3, 64), (3, 65), (7, 700), (2, 3, 129), (40_000,)])
@pytest.mark.parametrize(("b", "o"), list(itertools.product(DTYPES, DTYPES)))
def test_ranks_are_those_of_a_stable_sort(shape: tuple[int, ...], b: torch.dtype, o: torch.dtype) -> None:
    base, own = draw(shape).to(b), (draw(shape) + 0.1 * draw(shape, 1)).to(o)
    delta = (own.float() - base.float()).abs()
    assert ranks._loaded(b, o) is not None
    for dtype in (torch.int32, torch.float32):
        assert torch.equal(ranks.row_ranks(own, dtype), expected(own.float()).to(dtype))
        assert torch.equal(ranks.delta_ranks(base, own, dtype), expected(delta).to(dtype))
    short = ranks.delta_ranks(base, own, torch.int16) if shape[-1] < 2**15 else torch.zeros((), dtype=torch.int16)
    assert short.dtype == torch.int16
    assert shape[-1] >= 2**15 or torch.equal(short.long(), expected(delta))


TIED = {
    "all equal": torch.full((5, 300), 0.25),
    "few values": torch.arange(1500).reshape(5, 300).remainder(3) / 4.0,
    "both zeros": torch.where(torch.arange(1500).reshape(5, 300) % 2 == 0, 0.0, -0.0),
    "signs and infinity": torch.tensor([1.0, -1.0, torch.inf, -torch.inf, 0.0, -0.0] * 50),
    "not a number": torch.tensor([1.0, torch.nan, torch.inf, -torch.nan, -1.0] * 50),
    "smallest and largest": torch.tensor([2.0**-149, -(2.0**-149), 3.4e38, -3.4e38, 2.0**-126] * 30),
}


@needs_compiler
@pytest.mark.parametrize("kind", TIED)
def test_ties_keep_their_order_and_every_number_its_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_c = ranks.row_ranks(TIED[kind])
    assert ranks._loaded(None, torch.float32) is not None
    assert torch.equal(in_c.long(), expected(TIED[kind]))
    without_compiler(monkeypatch)
    assert torch.equal(ranks.row_ranks(TIED[kind]), in_c)


@needs_compiler
def test_ranks_and_histograms_are_the_same_without_a_compiler_and_with_other_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, own = draw((700, 999)).bfloat16(), draw((700, 999), 1).bfloat16()  # more than a thread's part

    def all_of_it() -> list[Tensor]:
        counts = torch.zeros(2, 2**ranks.BITS, dtype=torch.int64)
        ranks.count_scores(own.float().reshape(-1), counts[0])
        ranks.count_deltas(base.reshape(-1), own.reshape(-1), counts[1])
        return [ranks.row_ranks(own.t()), ranks.row_ranks(own), ranks.delta_ranks(base, own, torch.float32), counts]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_of_it()
        torch.set_num_threads(3)
        several = all_of_it()
    finally:
        torch.set_num_threads(before)
    without_compiler(monkeypatch)
    for x, y, z in zip(alone, several, all_of_it(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    assert alone[3].sum(1).tolist() == [own.numel()] * 2


@pytest.mark.parametrize("n", [1000, EXACT_LIMIT + 77])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_a_table_of_deltas_is_the_table_of_their_sizes(n: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        without_compiler(monkeypatch)
    base, own = draw((n,)).bfloat16(), draw((n,), 1).bfloat16()
    size = (own.float() - base.float()).abs()
    builder = OrderStatisticsBuilder(2 * n)
    builder.add_deltas(base, own, float(size.max()))
    builder.add_deltas(own, base, float(size.max()))
    whole = order_statistics([size, size])
    found = builder.finish()
    assert (found.n, found.maximum) == (2 * n, float(size.max()))
    assert [found.cut(k) for k in (1, n // 3, n, 2 * n - 1)] == [whole.cut(k) for k in (1, n // 3, n, 2 * n - 1)]
    by_hand = torch.sort(torch.cat([size, size]), descending=True).values
    for k in (1, n // 2, 2 * n):
        assert found.value(k) == pytest.approx(float(by_hand[k - 1]), rel=2**-10)

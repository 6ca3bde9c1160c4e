"""Tensors of host memory reach the device once each, two names at a time, without a changed bit."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_search.engine.engine import MergeEngine
from merge_search.engine.resident.pool import ModelPool
from merge_search.engine.resident.transfers import Transfers
from merge_search.presets import preset

CPU = torch.device("cpu")


class Host:
    """Tensors by name, and the names that were read."""

    def __init__(self, names: str) -> None:
        self.tensors = {n: [torch.full((3,), float(i)), torch.full((3,), i + 0.5)] for i, n in enumerate(names)}
        self.read: list[str] = []

    def __call__(self, name: str) -> list[Tensor]:
        self.read.append(name)
        return self.tensors[name]


def test_names_in_the_expected_order_are_moved_once_each_and_the_next_one_ahead() -> None:
    host = Host("abcd")
    transfers = Transfers(host, CPU)
    transfers.expect("abcd")
    moved = []
    for name, ahead in zip("abcd", ("ab", "abc", "abcd", "abcd"), strict=True):
        for _ in range(3):
            found = transfers.get(name)
            assert all(map(torch.equal, found, host.tensors[name]))
            assert not {t.data_ptr() for t in found} & {t.data_ptr() for t in host.tensors[name]}
        moved.append("".join(host.read))
        assert moved[-1] == ahead
        assert len(transfers._moved) <= 2


def test_names_outside_the_expected_order_are_moved_on_request_and_at_most_two_are_held() -> None:
    host = Host("abcd")
    transfers = Transfers(host, CPU)
    transfers.expect("abc")
    for name in "adcab":
        assert all(map(torch.equal, transfers.get(name), host.tensors[name]))
        assert set(transfers._moved) <= {name, *{"a": "b", "b": "c"}.get(name, "")}
    transfers.expect("")
    del host.read[:]
    for name in "cd":
        transfers.get(name)
    assert host.read == ["c", "d"]  # each on request, nothing ahead


def test_moved_tensors_are_freed_at_the_end_of_a_pass_unless_the_next_pass_begins_with_them() -> None:
    host = Host("abc")
    transfers = Transfers(host, CPU)
    transfers.expect("abc")
    held = [weakref.ref(t) for name in "ab" for t in transfers.get(name)]
    held += [weakref.ref(t) for t in transfers._moved["c"].tensors]  # moved ahead
    transfers.expect("")
    assert not [t for t in held if t() is not None]
    mine = transfers.get("b")
    transfers.expect("bc")
    assert transfers.get("b")[0] is mine[0]
    transfers.expect("cb")
    assert torch.equal(transfers.get("c")[1], host.tensors["c"][1])
    assert torch.equal(mine[0], host.tensors["b"][0])  # tensors in use stay alive
    assert host.read == [*"abc", "b", "c", "b"]


def test_a_name_that_does_not_fit_ahead_is_moved_on_request(caplog: pytest.LogCaptureFixture) -> None:
    host = Host("abcd")
    fitting = host.tensors.copy()

    def full() -> None:
        """Copies of it would take four pebibytes, which no machine has."""
        for name in "bcd":
            host.tensors[name] = [fitting[name][0], torch.zeros(1).expand(2**50)]

    transfers = Transfers(host, CPU)
    transfers.expect("abcd")
    full()
    with caplog.at_level("INFO"):
        for name in "abcd":
            host.tensors[name] = fitting[name]
            assert all(map(torch.equal, transfers.get(name), fitting[name]))
            assert list(transfers._moved) == [name]
    assert host.read == ["a", "b", "b", "c", "c", "d", "d"]
    assert [r.message for r in caplog.records] == [
        "cpu: too little memory for two tensors at a time; some are copied only when they are needed"
    ]
    full()
    transfers.expect("ab")
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        transfers.get("b")  # there is no room even for it alone
    assert transfers._moved == {}
    assert torch.equal(transfers.get("a")[0], fitting["a"][0])


def test_a_tensor_that_an_expert_shares_with_the_base_is_moved_once() -> None:
    base = torch.ones(3)
    found = Transfers(lambda _: [base, base, base.clone()], CPU).get("x")
    assert found[0] is found[1]
    assert found[2] is not found[0]


def test_a_transfer_that_fails_can_be_asked_for_again() -> None:
    host = Host("ab")
    del host.tensors["b"]
    transfers = Transfers(host, CPU)
    transfers.expect("ab")
    with pytest.raises(KeyError):
        transfers.get("a")  # b, which is moved ahead, does not exist
    assert torch.equal(transfers.get("a")[0], torch.zeros(3))


def test_an_engine_moves_every_tensor_once_a_candidate_and_merges_the_same_bits(make_models: Any) -> None:
    pool, _ = make_models()
    host: list[str] = []

    def read(name: str) -> list[Tensor]:
        host.append(name)
        return pool._in_host_memory(name)

    resident = MergeEngine(pool, compile=False)
    streamed = ModelPool(pool.models, device="cpu")
    streamed._transfers = Transfers(read, CPU)
    engine = MergeEngine(streamed, compile=False)
    views = [{n: torch.empty_like(pool.base(n)) for n in pool.groups} for _ in range(2)]
    for coefficient in (0.3, 0.4):  # the second candidate finds all measurements in the cache
        del host[:]
        recipe = preset("ties", pool.models, coefficients=coefficient)
        resident.apply(recipe, views[0])
        engine.apply(recipe, views[1])
        assert all(torch.equal(views[0][n], views[1][n]) for n in pool.groups)
    assert host == [*pool.groups]
    assert [(n, t.tolist()) for n, t in engine.merged(recipe)] == [(n, t.tolist()) for n, t in resident.merged(recipe)]
    assert not streamed._transfers._next  # nothing is moved ahead after the last pass


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ties", "della", "task_arithmetic"])
def test_a_pool_in_pinned_memory_merges_the_bits_of_one_on_the_gpu(make_models: Any, name: str) -> None:
    models = make_models()[0].models
    pools = [ModelPool(models, device="cuda", memory=memory) for memory in (None, 1e-6)]
    assert [pool.placement for pool in pools] == ["resident", "pinned"]
    engines = [MergeEngine(pool, compile=False) for pool in pools]
    views = [{n: torch.empty_like(pools[0].base(n)) for n in pools[0].groups} for _ in pools]
    for coefficient in (0.3, 0.4, 0.5):
        for engine, mine in zip(engines, views, strict=True):
            engine.apply(preset(name, models, coefficients=coefficient), mine)
        assert [n for n in views[0] if not torch.equal(views[0][n], views[1][n])] == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_in_use_are_complete_and_at_most_two_names_are_in_memory() -> None:
    n, names = 2**24, [str(i) for i in range(12)]
    held = {name: [torch.full((n,), float(i)).pin_memory()] for i, name in enumerate(names)}
    transfers = Transfers(held.__getitem__, torch.device("cuda"))
    transfers.expect(names)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    totals = torch.zeros(len(names), device="cuda", dtype=torch.float64)
    for i, name in enumerate(names):
        for _ in range(20):  # slow work that the host runs ahead of
            totals[i] = transfers.get(name)[0].sum(dtype=torch.float64)
    assert totals.tolist() == [float(i) * n for i in range(len(names))]
    assert torch.cuda.max_memory_allocated() - before <= 2 * 4 * n + 2**22

"""One budget for several caches: together they stay within it, alone a cache gets its share, idle ones give way."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_search import memory
from merge_search.engine.engine import MergeEngine
from merge_search.engine.learners.slopes import Parts
from merge_search.engine.resident.in_memory import MemoryTensors
from merge_search.memory import IDLE_TURNS, BudgetedCache, MemoryBudget
from merge_search.presets import preset
from merge_search.recipe import Operator, Recipe

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put and evict", "get", "drop", "turns"]),
        st.integers(0, 2),  # cache
        st.integers(0, 4),  # key
        st.integers(0, 60),  # bytes
    ),
    max_size=60,
)


@given(actions=ACTIONS, limit=st.integers(0, 100), each=st.integers(0, 100))
def test_caches_hold_what_they_say_and_never_more_than_their_budget(actions, limit: int, each: int) -> None:
    budget = MemoryBudget(limit, each=each)
    caches: list[BudgetedCache[int]] = [BudgetedCache(budget) for _ in range(3)]
    for action, which, key, size in actions:
        cache = caches[which]
        if action.startswith("put"):
            room, others = cache.limit - cache.held, [c.held for c in caches if c is not cache and not c.is_idle]
            is_new = cache.get(key) is None
            kept = cache.put(key, size, size, evict=action == "put and evict")
            assert kept == (cache.get(key) == size)
            assert kept or not is_new or size > room
            assert [c.held for c in caches if c is not cache and not c.is_idle] == others  # those in use lose nothing
        elif action == "get":
            cache.get(key)
        elif action == "drop":
            cache.drop(key)
        else:
            budget.turn += size
        assert budget.held == sum(c.held for c in caches) <= limit
        for c in caches:
            assert c.held == sum(n for _, n in c._entries.values()) <= each
            assert c.held <= c.limit or c.is_idle


def test_a_cache_alone_gets_its_share_and_two_share_what_there_is() -> None:
    budget = MemoryBudget(60, each=40)
    one, two = BudgetedCache[str](budget), BudgetedCache[str](budget)
    assert [one.put(key, key, 10) for key in "abcde"] == [True, True, True, True, False]
    assert [two.put(key, key, 10) for key in "abc"] == [True, True, False]
    assert (one.held, two.held, two.limit) == (40, 20, 20)


def test_an_idle_cache_gives_up_what_it_used_longest_ago() -> None:
    budget = MemoryBudget(60, each=40)
    one, two = BudgetedCache[str](budget), BudgetedCache[str](budget)
    for key in "abcd":
        one.put(key, key, 10)
    one.get("a")
    budget.turn += IDLE_TURNS
    two.get("x")
    assert [two.put(key, key, 10) for key in "xyz"] == [True, True, False]
    budget.next_turn()
    assert two.put("z", "z", 10)
    assert [key for key in "abcd" if key in one._entries] == ["a", "c", "d"]
    assert budget.held == 60


def test_a_cache_that_is_gone_holds_nothing() -> None:
    budget = MemoryBudget(10)
    cache = BudgetedCache[str](budget)
    cache.put("a", "a", 10)
    del cache
    gc.collect()
    assert budget.held == 0


@pytest.mark.parametrize("free", [30_000, 10**9])
def test_the_three_caches_of_an_engine_stay_within_half_of_the_free_memory(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: free)
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(20, 30, generator=generator) for i in range(4)}
    experts = {e: {n: t + 0.1 * torch.randn(20, 30, generator=generator) for n, t in base.items()} for e in "ab"}
    tensors = MemoryTensors(base, experts)
    engine = MergeEngine(tensors, compile=False)
    plain = Recipe(models=tensors.models)
    recipes = [preset("della", tensors.models), plain.model_copy(update={"operator": Operator(name="tsv_m")})]
    merged = [dict(engine.merged(recipe)) for recipe in recipes]
    kept = [Parts(engine, plain), Parts(engine, recipes[1])]
    for parts in kept:
        for name in tensors.groups:
            parts.get(name)
    again = [dict(engine.merged(recipe)) for recipe in recipes]
    held = [engine._measurements.stored.held, engine._operator_cache.held, *(p._cache.held for p in kept)]
    assert all(0 < n <= free // 3 for n in held[:2])
    assert engine.budget.held == sum(held) <= free // 2
    assert all(torch.equal(x[n], y[n]) for x, y in zip(merged, again, strict=True) for n in base)

"""Free memory, one budget for the caches of an engine, and recognising out-of-memory errors. Imports no torch.

Several caches keep results that candidates have in common: scores and ranks, results of operators, parts of a fit.
They share one `MemoryBudget`:

- One cache holds at most a third of the memory that was free when the budget was made, all together at most half of it.
- A cache gets what the others leave. A cache that nobody asked during the last `IDLE_TURNS` merges is idle: it gives up
  its entries, the least recently used first, to a cache that asks for their room.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["IDLE_TURNS", "BudgetedCache", "MemoryBudget", "free_bytes", "free_host_bytes", "is_memory_error"]

V = TypeVar("V")

IDLE_TURNS = 16
_ONE_CACHE = 1 / 3  # share of the free memory; the models and their activations need the rest
_ALL_CACHES = 1 / 2


def free_host_bytes() -> int:
    """Main memory that can still be taken: the machine's, within this container's limit."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():  # not Linux: there is no portable way to ask, so assume half of the memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = 1024 * _field(meminfo, "MemAvailable:")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        used = int((group / "memory.current").read_text()) - _field(group / "memory.stat", "inactive_file")
        free = min(free, int(text) - used)
    return max(free, 0)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, of a GPU or of the machine."""
    if device.type != "cuda":
        return free_host_bytes()
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def is_memory_error(error: Exception) -> bool:
    """Whether a device or the machine had no memory left."""
    import torch

    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)  # torch's message on a CPU


def _field(file: Path, name: str) -> int:
    """Number behind `name` in a file of ``name number`` lines."""
    return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name]), 0)


class MemoryBudget:
    """Bytes that several caches may hold.

    Args:
        limit: Bytes of all caches together.
        each: Bytes of one cache, unless that cache has a limit of its own; None: `limit`.
    """

    def __init__(self, limit: int, *, each: int | None = None) -> None:
        self.limit = limit
        self.each = limit if each is None else each
        self.turn = 0
        self._caches: weakref.WeakSet[BudgetedCache[object]] = weakref.WeakSet()  # a cache leaves when it is collected

    @classmethod
    def of_free_memory(cls, device: torch.device, *, at_least: int = 0) -> MemoryBudget:
        """A budget of half of a device's free memory, of which one cache may take two thirds.

        Args:
            at_least: Bytes of the budget, even where less is free.
        """
        free = free_bytes(device)
        return cls(max(int(_ALL_CACHES * free), at_least), each=int(_ONE_CACHE * free))

    @property
    def held(self) -> int:
        """Bytes that all caches hold."""
        return sum(cache.held for cache in list(self._caches))

    def next_turn(self) -> None:
        """Begin another merge."""
        self.turn += 1

    def _join(self, cache: BudgetedCache[V]) -> None:
        self._caches.add(cache)  # type: ignore[arg-type]

    def _left_for(self, cache: BudgetedCache[V]) -> int:
        """Bytes that `cache` may hold in all: what caches that are in use leave."""
        busy = (c.held for c in list(self._caches) if c is not cache and not c.is_idle)
        return self.limit - sum(busy)

    def _make_room(self, n_bytes: int) -> bool:
        """Have idle caches give up entries until `n_bytes` more fit; whether they do."""
        for cache in list(self._caches):
            if (missing := self.held + n_bytes - self.limit) <= 0:
                break
            if cache.is_idle:
                cache.give_up(missing)
        return self.held + n_bytes <= self.limit


class BudgetedCache(Generic[V]):
    """Entries by key, counted against a `MemoryBudget`.

    Args:
        limit: Most bytes that it may hold; None: the budget's `each`.

    Attributes:
        held: Bytes of its entries.
    """

    def __init__(self, budget: MemoryBudget, limit: int | None = None) -> None:
        self.held = 0
        self._budget = budget
        self._limit = budget.each if limit is None else limit
        self._last_turn = budget.turn
        self._entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()  # the least recently used first
        budget._join(self)

    @property
    def limit(self) -> int:
        """Most bytes that it may hold as long as the other caches hold what they do."""
        return min(self._limit, self._budget._left_for(self))

    @property
    def is_idle(self) -> bool:
        """Whether nobody asked it during the last `IDLE_TURNS` merges."""
        return self._budget.turn - self._last_turn > IDLE_TURNS

    def get(self, key: Hashable) -> V | None:
        """The entry, which is now the most recently used one; None if it is not there."""
        self._last_turn = self._budget.turn
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: V, n_bytes: int, *, evict: bool = False) -> bool:
        """Keep an entry in place of the one with the same key.

        A cyclic scan larger than the cache evicts every entry before it is used again: callers that scan leave `evict`
        off.

        Args:
            evict: Drop own entries that were used longest ago, where room is short.
        Returns:
            Whether the entry is kept.
        """
        self._last_turn = self._budget.turn
        self.drop(key)
        limit = self.limit
        if n_bytes > limit:
            return False
        if evict:
            self.give_up(self.held + n_bytes - limit)
        if self.held + n_bytes > limit or not self._budget._make_room(n_bytes):
            return False
        self._entries[key] = (value, n_bytes)
        self.held += n_bytes
        return True

    def drop(self, key: Hashable) -> None:
        """Forget an entry, if it is there."""
        if key in self._entries:
            self.held -= self._entries.pop(key)[1]

    def give_up(self, n_bytes: int) -> None:
        """Drop entries that were used longest ago until `n_bytes` are free or none is left."""
        aim = self.held - n_bytes
        while self._entries and self.held > aim:
            self.held -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()
        self.held = 0

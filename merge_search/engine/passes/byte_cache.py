"""A cache of tensors beside which a few entries can be held that do not fit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from merge_search.memory import BudgetedCache, MemoryBudget

__all__ = ["ByteCache", "n_bytes"]

_PASSING = 4  # entries held beside the others: more than one candidate asks of one tensor


class ByteCache:
    """Tensors by key, within a budget. The least recently used are dropped where room is short.

    A cyclic scan larger than the cache evicts every entry before it is used again. Callers that scan should cache a
    fixed prefix with `put` and pass the rest through `hold`.

    Args:
        limit: Most bytes; None: what the budget allows one cache.
    """

    def __init__(self, budget: MemoryBudget, limit: int | None = None) -> None:
        self._kept: BudgetedCache[list[Tensor]] = BudgetedCache(budget, limit)
        self._passing: tuple[Hashable, dict[Hashable, list[Tensor]]] = (None, {})

    @property
    def held(self) -> int:
        """Bytes that are kept, those of passing entries not counted."""
        return self._kept.held

    @property
    def limit(self) -> int:
        """Bytes that can be kept as long as the other caches of the budget hold what they do."""
        return self._kept.limit

    def get(self, key: Hashable) -> list[Tensor] | None:
        """The tensors under `key`, None if they are not there."""
        kept = self._kept.get(key)
        return self._passing[1].get(key) if kept is None else kept

    def drop(self, key: Hashable) -> None:
        """Forget an entry, if it is there."""
        self._passing[1].pop(key, None)
        self._kept.drop(key)

    def put(self, key: Hashable, value: list[Tensor]) -> None:
        """Keep an entry, unless it is larger than the cache."""
        self._passing[1].pop(key, None)
        self._kept.put(key, value, n_bytes(value), evict=True)

    def hold(self, key: Hashable, value: list[Tensor], turn: Hashable) -> None:
        """Keep an entry beside all others until one of another turn comes, or `_PASSING` more of this turn."""
        if self._passing[0] != turn:
            self._passing = (turn, {})
        passing = self._passing[1]
        passing.pop(key, None)
        passing[key] = value
        if len(passing) > _PASSING:  # a model of one tensor never has another turn
            del passing[next(iter(passing))]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._passing = (None, {})


def n_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' storages, a tensor that comes twice counted once."""
    return sum(t.untyped_storage().nbytes() for t in {id(t): t for t in tensors}.values())

"""Tensors that are kept as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from torch import Tensor

__all__ = ["ByteCache"]


class ByteCache:
    """Tensors by key, the least recently used dropped once `limit` bytes are held."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._entries: OrderedDict[Hashable, list[Tensor]] = OrderedDict()

    def get(self, key: Hashable) -> list[Tensor] | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def drop(self, key: Hashable) -> None:
        """Forget an entry, if it is there."""
        if key in self._entries:
            self.held -= _bytes(self._entries.pop(key))

    def put(self, key: Hashable, value: list[Tensor]) -> None:
        size = _bytes(value)
        if size > self.limit:
            return
        self.drop(key)
        self._entries[key] = value
        self.held += size
        while self.held > self.limit:
            self.held -= _bytes(self._entries.popitem(last=False)[1])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in {id(t): t for t in tensors}.values())

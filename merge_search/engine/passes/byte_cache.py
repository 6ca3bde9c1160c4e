"""Tensors that are kept as long as there is room, and how much there is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from merge_search.memory import free_host_bytes

__all__ = ["ByteCache", "free_bytes", "room"]

_PASSING = 4  # entries held beside the others: more than one candidate asks of one tensor
_SHARE = 1 / 3  # the models, their activations and other caches need the rest


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken, of a GPU or of the machine."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_bytes()


def room(device: torch.device) -> int:
    """Bytes that each cache may take where nobody says how many: a third of what is free when it is made."""
    return int(_SHARE * free_bytes(device))


class ByteCache:
    """Tensors by key, the least recently used dropped once `limit` bytes are held.

    What is asked for in one order, again and again, would push itself out where it does not fit: a caller that knows so
    keeps a part of it, and lets the rest pass by.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._entries: OrderedDict[Hashable, list[Tensor]] = OrderedDict()
        self._passing: tuple[Hashable, dict[Hashable, list[Tensor]]] = (None, {})

    def get(self, key: Hashable) -> list[Tensor] | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return self._passing[1].get(key) if found is None else found

    def drop(self, key: Hashable) -> None:
        """Forget an entry, if it is there."""
        self._passing[1].pop(key, None)
        if key in self._entries:
            self.held -= _bytes(self._entries.pop(key))

    def put(self, key: Hashable, value: list[Tensor]) -> None:
        size = _bytes(value)
        self._passing[1].pop(key, None)
        if size > self.limit:
            return
        self.drop(key)
        self._entries[key] = value
        self.held += size
        while self.held > self.limit:
            self.held -= _bytes(self._entries.popitem(last=False)[1])

    def hold(self, key: Hashable, value: list[Tensor], turn: Hashable) -> None:
        """Keep an entry beside all others, and only until one of another turn comes, or `_PASSING` of this one."""
        if self._passing[0] != turn:
            self._passing = (turn, {})
        passing = self._passing[1]
        passing.pop(key, None)
        passing[key] = value
        if len(passing) > _PASSING:  # of one tensor alone there is never another turn
            del passing[next(iter(passing))]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in {id(t): t for t in tensors}.values())

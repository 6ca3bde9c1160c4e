"""Tensors of host memory, moved to the device name by name: the next name's while the one before is merged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from merge_search.memory import is_memory_error

__all__ = ["Transfers"]

_log = logging.getLogger(__name__)


class _Moved(NamedTuple):
    tensors: list[Tensor]
    event: torch.cuda.Event | None  # after the copies


class Transfers:
    """Copies of host tensors on a device: of the name that is used, and of the one expected next, no others.

    On a GPU copies run on a stream of their own, beside the merge. The host waits for what used the last name before the
    name after next begins to move, so that the memory of two names is all that is taken, however far the host is ahead.
    A name for which there is no room ahead moves when it is asked for, in the place of the one before.

    Args:
        read: Name -> base and experts in host memory, page-locked if copies are to overlap; one object where an expert
            shares the base's tensor, and so on the device.
        device: Where they go.
    Raises:
        torch.OutOfMemoryError, or RuntimeError on a CPU: there is no room for the one name that is asked for. What was
        held is let go by the next call.
    For one thread.
    """

    def __init__(self, read: Callable[[str], Sequence[Tensor]], device: torch.device) -> None:
        self._read, self._device = read, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._after: dict[str, str] = {}
        self._there: dict[str, _Moved] = {}
        self._used = ""
        self._is_short = False

    def expect(self, names: Sequence[str]) -> None:
        """In which order names will be asked for. All that is on the device is let go, but the first of them if it is there.

        Empty: nothing is moved before it is asked for.
        """
        self._after = dict(pairwise(names))
        self._there = {n: self._there[n] for n in names[:1] if n in self._there}
        self._used = ""

    def get(self, name: str) -> list[Tensor]:
        """Base and experts on the device, for use on its current stream. Do not write into them."""
        if name != self._used:
            self._switch(name)
        return self._there[name].tensors

    def _switch(self, name: str) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()  # nothing reads the last name any more
        self._used = ""
        self._there = {n: moved for n, moved in self._there.items() if n == name}
        if name not in self._there:
            self._there[name] = self._move(name)
        self._admit(self._there[name])
        self._used = name
        if (following := self._after.get(name)) is not None:
            self._move_ahead(following)

    def _move_ahead(self, name: str) -> None:
        try:
            self._there[name] = self._move(name)
        except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_memory_error(error):
                raise
            if not self._is_short:
                _log.info(
                    "%s: no room for two tensors at a time, so some are copied when their turn comes", self._device
                )
            self._is_short = True

    def _move(self, name: str) -> _Moved:
        own = self._read(name)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            different = {id(t): t for t in own}
            copies = {k: t.to(self._device, non_blocking=True, copy=True) for k, t in different.items()}
            event = None if self._stream is None else self._stream.record_event()
        return _Moved([copies[id(t)] for t in own], event)

    def _admit(self, moved: _Moved) -> None:
        """Have the current stream wait for the copies, and the allocator for the current stream."""
        if moved.event is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(moved.event)
        for tensor in moved.tensors:
            tensor.record_stream(stream)

"""Move tensors from host memory to the device, one name at a time, copying the next while the current one is merged."""

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
    """Tensors of one name on the device.

    Attributes:
        tensors: Base and experts.
        event: Recorded after the copies; None on a CPU.
    """

    tensors: list[Tensor]
    event: torch.cuda.Event | None


class Transfers:
    """Copies of host tensors on a device: those of the name in use and of the next expected name, no others.

    On a GPU, copies run on their own stream, beside the merge. The host waits for the work on the last name before it
    starts to move the name after next. So the memory of two names is the most that is taken, however far the host is
    ahead. If there is no room to move a name ahead, it moves when it is asked for, and takes the memory of the name
    before.

    Args:
        read: Name -> base and experts in host memory, page-locked if copies are to overlap. Where an expert shares the
            base's tensor it returns the same object, and both share one copy on the device.
        device: Where the copies go.
    Raises:
        torch.OutOfMemoryError: The name that is asked for does not fit. On a CPU this is a RuntimeError. The next call
            frees what was held.
    For one thread.
    """

    def __init__(self, read: Callable[[str], Sequence[Tensor]], device: torch.device) -> None:
        self._read, self._device = read, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: dict[str, str] = {}
        self._moved: dict[str, _Moved] = {}
        self._in_use = ""
        self._is_short = False

    def expect(self, names: Sequence[str]) -> None:
        """Announce the order in which names will be asked for. Frees everything on the device except the first of them.

        Args:
            names: In order. If empty, nothing is moved before it is asked for.
        """
        self._next = dict(pairwise(names))
        self._moved = {n: self._moved[n] for n in names[:1] if n in self._moved}
        self._in_use = ""

    def get(self, name: str) -> list[Tensor]:
        """Return base and experts on the device, for use on its current stream. Do not write into them."""
        if name != self._in_use:
            self._switch(name)
        return self._moved[name].tensors

    def _switch(self, name: str) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()  # afterwards nothing reads the last name
        self._in_use = ""
        self._moved = {n: moved for n, moved in self._moved.items() if n == name}
        if name not in self._moved:
            self._moved[name] = self._move(name)
        self._admit(self._moved[name])
        self._in_use = name
        if (following := self._next.get(name)) is not None:
            self._move_ahead(following)

    def _move_ahead(self, name: str) -> None:
        try:
            self._moved[name] = self._move(name)
        except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_memory_error(error):
                raise
            if not self._is_short:
                _log.info(
                    "%s: too little memory for two tensors at a time; some are copied only when they are needed",
                    self._device,
                )
            self._is_short = True

    def _move(self, name: str) -> _Moved:
        tensors = self._read(name)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            different = {id(t): t for t in tensors}
            copies = {k: t.to(self._device, non_blocking=True, copy=True) for k, t in different.items()}
            event = None if self._stream is None else self._stream.record_event()
        return _Moved([copies[id(t)] for t in tensors], event)

    def _admit(self, moved: _Moved) -> None:
        """Make the current stream wait for the copies, and the allocator for the current stream."""
        if moved.event is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(moved.event)
        for tensor in moved.tensors:
            tensor.record_stream(stream)

"""Let SIGTERM and SIGUSR1 stop a run as Ctrl-C does. Schedulers and spot machines send them before they kill."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

__all__ = ["WINDING_DOWN", "Stopped", "exit_status", "stoppable"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WINDING_DOWN = 10.0
"""Seconds after a signal in which further ones are ignored. Slurm, for instance, may send both."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


def exit_status(stop: KeyboardInterrupt) -> int:
    """The conventional exit status of a process that a signal stopped: 128 + the signal's number.

    >>> exit_status(KeyboardInterrupt())
    130
    """
    return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` when SIGTERM or SIGUSR1 arrives, and restore the handlers afterwards.

    Signals that are ignored stay ignored, as a parent process wants it. In another thread than the main one nothing is
    changed, since Python lets only the main thread install handlers.

    Raises:
        Stopped: A signal arrived.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -math.inf

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        if monotonic() - last >= WINDING_DOWN:
            last = monotonic()
            raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])

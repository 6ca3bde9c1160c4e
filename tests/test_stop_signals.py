"""SIGTERM and SIGUSR1 raise what Ctrl-C raises, while somebody asks for it, and no longer."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from merge_search import stop_signals
from merge_search.stop_signals import Stopped, exit_status, stoppable


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_is_a_keyboard_interrupt_with_its_own_exit_status(number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, stoppable():
        os.kill(os.getpid(), number)
    assert isinstance(caught.value, Stopped)
    assert exit_status(caught.value) == status, "128 + the signal's number"
    assert signal.getsignal(number) == before


def test_ctrl_c_keeps_its_handler_and_its_exit_status() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) == before
    assert exit_status(KeyboardInterrupt()) == 130


def test_a_second_signal_does_not_break_off_what_the_first_one_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop_signals, "monotonic", lambda: now)
    with stoppable():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGUSR1)
        now += stop_signals.WINDING_DOWN - 1
        os.kill(os.getpid(), signal.SIGTERM)  # nothing is raised
        now += 2
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_another_thread_than_the_main_one_changes_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN

"""A real run that a scheduler stops, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import optuna
import pytest
from command_line import ENV, here
from failing_studies import EVALUATOR, write_study
from optuna.trial import FrozenTrial, TrialState

from merge_search.outcome import Outcome
from merge_search.search.process_record import PROCESS
from merge_search.search.records import finished_records
from merge_search.search.storage import INTERRUPTED

HANGING = '''
import time

class Hanging(Counted):
    """After the number of calls in a file, asks three questions, says so in a file, and waits to be stopped."""

    def __init__(self, options, *, shares, seed, folder):
        super().__init__(options, shares=shares, seed=seed)
        self.folder = folder

    def evaluate(self, split, fidelity=1.0, *, after=0.0):
        asked = super().evaluate
        if (self.folder / "hang").exists() and Norm.calls == int((self.folder / "hang").read_text()):
            self.n_asked += 3
            (self.folder / "hangs").touch()
            time.sleep(120)
        return asked(split, fidelity, after=after)
'''


@pytest.fixture
def path(demo: Path, tmp_path: Path) -> Path:
    path = write_study(tmp_path, demo, "Hanging", n_trials=5)
    (tmp_path / "mine.py").write_text(EVALUATOR + HANGING)
    return path


def stop_while_it_asks(path: Path, number: signal.Signals, *, after: int) -> tuple[int, str]:
    """Run the study until its evaluator hangs, and send a signal.

    Args:
        path: The study file.
        number: The signal.
        after: Number of calls of the evaluator that are answered first.

    Returns:
        The exit status, and what was printed.
    """
    (path.parent / "hang").write_text(str(after))
    mark = path.parent / "hangs"
    line = [sys.executable, "-m", "merge_search", "run", str(path)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
    deadline = time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, text = process.communicate(timeout=60)
    assert mark.exists(), text
    mark.unlink()
    (path.parent / "hang").unlink()
    return process.returncode, text


def trials(path: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name="s", storage=f"sqlite:///{path.parent / 's.db'}").trials


def test_a_preempted_point_is_tried_again_and_is_no_crash(path: Path) -> None:
    """Base and expert are two calls. Their baselines repeat these scores, so the third call is another trial's."""
    stops = [(signal.SIGTERM, 2), (signal.SIGUSR1, 0)]
    for number, after in stops:
        status, text = stop_while_it_asks(path, number, after=after)
        assert status == 128 + number
        assert "stopped; nothing finished is lost, and the same command goes on from here" in text
        assert "Traceback" not in text
        (running,) = [t for t in trials(path) if t.state == TrialState.RUNNING]
        assert running.user_attrs[INTERRUPTED]
        assert running.user_attrs["cost"][2] == 3, "the questions that were asked are charged"
        assert running.user_attrs[PROCESS]["pid"] > 0
    here("run", path)
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{path.parent / 's.db'}")
    assert len(finished_records(study)) == 5
    lost = [t for t in study.trials if t.user_attrs.get("outcome") == Outcome.LOST]
    assert len(lost) == 2
    assert all("death" not in t.user_attrs for t in lost)
    tries = {t.user_attrs["retry_of"]: t.user_attrs["outcome"] for t in study.trials if "retry_of" in t.user_attrs}
    assert tries == {t.number: Outcome.OK for t in lost}


def test_ctrl_c_says_that_nothing_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge_search.search import run as module

    monkeypatch.setattr(module, "prepare", mock.Mock(side_effect=KeyboardInterrupt))
    found = here("run", path, check=False)
    assert found.returncode == 130
    assert "stopped; nothing finished is lost" in found.stderr


def test_a_run_in_a_program_leaves_handlers_alone_unless_it_is_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from failing_studies import Quiet

    from merge_search.search import run as module
    from merge_search.study_file import read_study_file

    seen = []

    def look(*_: object) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))
        raise ZeroDivisionError

    monkeypatch.setattr(module, "prepare", look)
    before = signal.getsignal(signal.SIGTERM)
    for asked in (False, True):
        with pytest.raises(ZeroDivisionError):
            module.run(read_study_file(path), Quiet(), stop_on_signals=asked)
    assert seen[0] == before
    assert seen[1] != before
    assert signal.getsignal(signal.SIGTERM) == before

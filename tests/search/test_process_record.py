"""When the end of a process is evidence against the point that it was trying."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from merge_search.search import process_record
from merge_search.search.process_record import cause_of_death, this_process

HERE = {"boot": "b1", "pid_namespace": "pid:[1]", "host": "n1", "pid": 7, "oom_kills": 4}


@pytest.mark.parametrize(
    ("now", "cause"),
    [
        ({}, "the process crashed or was killed"),
        ({"oom_kills": 5}, "main memory was used up"),
        ({"boot": "b2"}, None),  # the machine is gone, or has been started again
        ({"boot": "b2", "oom_kills": 9}, None),
        ({"pid_namespace": "pid:[2]"}, None),  # the whole container is gone
        ({"pid_namespace": "pid:[2]", "oom_kills": 5}, "main memory was used up"),
        ({"boot": None}, None),
        ({"oom_kills": None}, "the process crashed or was killed"),
    ],
)
def test_a_process_must_have_died_alone(now: dict[str, Any], cause: str | None) -> None:
    assert cause_of_death(HERE, {**HERE, "host": "n2", "pid": 8, **now}) == cause


@pytest.mark.parametrize("record", [None, {}, {**HERE, "boot": None}])
def test_a_process_that_left_no_record_is_no_evidence(record: dict[str, Any] | None) -> None:
    assert cause_of_death(record, HERE) is None


def test_a_machine_that_does_not_say_when_it_was_started_is_never_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("BOOT", "NAMESPACE", "VMSTAT"):
        monkeypatch.setattr(process_record, name, tmp_path / "none")
    record = this_process()
    assert record["pid"] == os.getpid()
    assert cause_of_death(record, this_process()) is None


@pytest.mark.skipif(not process_record.BOOT.exists(), reason="no boot id on this system")
def test_kill_9_of_one_process_is_told_from_this_machine() -> None:
    code = "import json, os; from merge_search.search.process_record import this_process; "
    code += "print(json.dumps(this_process()), flush=True); os.kill(os.getpid(), 9)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL
    record = json.loads(process.stdout)
    assert record["pid"] != os.getpid()
    assert cause_of_death(record, {**this_process(), "oom_kills": record["oom_kills"]}) is not None

"""Which process runs a trial, and whether that process's end is evidence against the trial's point.

A process that catches a signal marks its trials itself (`storage.mark_interrupted`). One that is killed with SIGKILL,
or whose machine goes away, cannot. So each trial has a record of its process, and the next run compares it with the
system that it finds:

    the machine was started again, or is another one     no evidence: it was taken away
    the same machine, another container (PID namespace)  no evidence, unless the kernel killed a process for memory
    the same machine, the same container                 the process died alone: evidence against the point

A boot id that cannot be read equals no other one. A kill -9 by hand looks like a crash: use Ctrl-C or SIGTERM. A crash
after which a study goes on on another machine is not seen, so such a study needs more tries to give the point up.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PROCESS", "cause_of_death", "this_process"]

PROCESS = "process"
"""User attribute of a trial: `this_process()` of the driver that began it."""

BOOT = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")
VMSTAT = Path("/proc/vmstat")


def this_process() -> dict[str, Any]:
    """Machine, container and number of this process, and how many processes the kernel has killed for memory so far.

    What the system does not say is None.
    """
    return {
        "boot": _read(BOOT),
        "pid_namespace": _container(),
        "host": platform.node(),
        "pid": os.getpid(),
        "oom_kills": _oom_kills(),
    }


def cause_of_death(record: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """What a process that left a running trial died of; None if its end says nothing about the trial's point.

    Args:
        record: `this_process()` of that process; None if it left none.
        now: `this_process()` of a process that looks at the trial later.
    """
    if not record or record["boot"] is None or record["boot"] != now["boot"]:
        return None
    before, after = record["oom_kills"], now["oom_kills"]
    if before is not None and after is not None and after > before:
        return "main memory was used up"
    return None if record["pid_namespace"] != now["pid_namespace"] else "the process crashed or was killed"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _container() -> str | None:
    try:
        return os.readlink(NAMESPACE)
    except OSError:
        return None


def _oom_kills() -> int | None:
    for line in (_read(VMSTAT) or "").splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return None

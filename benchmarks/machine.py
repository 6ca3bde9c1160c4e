"""What every row of a benchmark says about where and when it was measured."""

from __future__ import annotations

import platform
import subprocess
import time
from pathlib import Path

__all__ = ["commit", "place", "processor"]


def processor() -> str:
    """The processor's name, as the system gives it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit() -> str:
    """The commit that is measured, with ``-dirty`` where files were changed since; '' outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def place() -> dict[str, str]:
    """Date, commit, processor, and the versions of torch and Python."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": processor(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip

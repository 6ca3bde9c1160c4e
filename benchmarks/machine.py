"""Where and when a benchmark was measured: the columns that all of them share."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["append", "commit", "place", "processor"]


def processor() -> str:
    """The processor's name, as the system gives it."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit() -> str:
    """The commit that is measured, with ``-dirty`` if files other than results differ; '' outside a repository."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()

    is_changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if is_changed else "")


def place() -> dict[str, str]:
    """Date, commit, processor, and the versions of torch and Python."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": processor(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def append(file: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a CSV file. A new file begins with its header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.is_file()
    with file.open("a", newline="") as f:
        writer = csv.DictWriter(f, fields)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)

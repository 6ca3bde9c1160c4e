"""How much main memory there is, and how it is told that there is none. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["free_host_bytes", "is_memory_error"]


def free_host_bytes() -> int:
    """Main memory that can still be taken: the machine's, within this container's limit."""
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():  # not Linux: no portable word for what is available, so assume half
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = 1024 * _field(meminfo, "MemAvailable:")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        used = int((group / "memory.current").read_text()) - _field(group / "memory.stat", "inactive_file")
        free = min(free, int(text) - used)
    return max(free, 0)


def is_memory_error(error: Exception) -> bool:
    """Whether a device or the machine had no memory left."""
    import torch

    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error)  # how torch says it on a CPU


def _field(file: Path, name: str) -> int:
    """Number behind `name` in a file of ``name number`` lines."""
    return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name]), 0)

"""The memory that processes of this machine may have, and what those that have ended had."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

_GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")


def available() -> tuple[int, int]:
    """(bytes that processes here may have in all, swap included; bytes that are free now)."""
    memory = psutil.virtual_memory()
    total, free = memory.total + psutil.swap_memory().total, memory.available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        taken = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return total, free
    return min(total, limit), min(free, limit - taken)


def told_of_a_kill() -> str:
    """Of a process that SIGKILL ended, for a message: the kernel sends it where memory runs out."""
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # KiB on Linux
    return (
        f"as the kernel does where memory runs out: the largest process had {most / _GIB:.1f} GiB "
        f"of this machine's {available()[0] / _GIB:.1f}; megafork train --dry-run plans it"
    )

"""The memory that processes of this machine may have, and what those that have ended had."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import psutil

_GIB = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")
KEPT = 256 << 20
"""Bytes that may lie free in the heap, since the next micro-batch takes them again"""


def available() -> tuple[int, int]:
    """Return (bytes that processes here may have in all, with swap; bytes that are free now)."""
    memory = psutil.virtual_memory()
    total, free = memory.total + psutil.swap_memory().total, memory.available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        taken = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return total, free
    return min(total, limit), min(free, limit - taken)


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def return_free_heap() -> None:
    """Give back to the system what lies free in glibc's heap, where that is more than KEPT.

    Blocks of up to 32 MiB, as an update's activations are, are cut from the heap, and what is freed
    between others stays taken: a rank of 0.3B parameters grew by 1.5 GiB over the micro-batches of
    one update, and the kernel ended the run. It takes microseconds where there is nothing to give.
    Having glibc map blocks of 256 KiB by themselves took less memory, but twice the quickstart's
    time for an update.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):  # an older glibc, or another C library
        return
    libc.mallinfo2.restype = _MallInfo
    if libc.mallinfo2().fordblks > KEPT:
        libc.malloc_trim(0)


def told_of_a_kill() -> str:
    """Return, for a message about a SIGKILL, that memory may have run out, and who had most."""
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # KiB on Linux
    return (
        f"as the kernel does where memory runs out: the largest process had {most / _GIB:.1f} GiB "
        f"of this machine's {available()[0] / _GIB:.1f}; megafork train --dry-run plans it"
    )

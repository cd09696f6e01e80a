"""The last words of a process that ends in failure: one line in a file, which says why.

torchrun's agent names a file for every rank in $TORCHELASTIC_ERROR_FILE, and shows what is in it.
The line says whether the failure is the process's own or follows from another's end, so that
whoever started the processes tells the earliest cause, whatever ended first. Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megafork.errors import PeerError
from megafork.system.printable import printable

VARIABLE = "TORCHELASTIC_ERROR_FILE"
_LONGEST = 2000
_COLLECTIVES = os.path.join("torch", "distributed", "")


@dataclass(frozen=True)
class Words:
    message: str
    own: bool
    """The failure is not the consequence of another process's end"""
    time: float
    """When they were left, in seconds since 1970"""
    status: int
    """The exit status that follows"""
    log: str | None
    """The file that has more"""

    @property
    def line(self) -> str:
        """The first line of the message, cut to a length that a job's last line holds."""
        lines = self.message.strip().splitlines() or [""]
        return lines[0][:_LONGEST]


def leave(message: str, *, status: int, own: bool = True, log: str | None = None) -> bool:
    """Write the message into the file that is named for it, unless one is there already.

    Returns whether the file has a message: it has none where no file was named or it cannot be
    written. status: the exit status that follows. own: False where another process's end is the
    cause. log: the file that has more.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return False
    now = time.time()
    more = {"timestamp": int(now), "time": now, "own": own, "status": status, "log": log}
    words = {"message": printable(message), "extraInfo": more}
    try:
        with open(path, "x") as file:
            json.dump({"message": words}, file)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def read(path: str | Path) -> Words | None:
    """Return what `leave` wrote into this file; None where it wrote nothing."""
    try:
        words = json.loads(Path(path).read_text())["message"]
        more = words["extraInfo"]
        return Words(words["message"], more["own"], more["time"], more["status"], more["log"])
    except (OSError, ValueError, TypeError, KeyError):  # torch's own way to write them is another
        return None


def of_exception(error: BaseException) -> str:
    """Return the line for an exception that nobody caught."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__


def follows_from_a_peer(error: BaseException) -> bool:
    """Return whether another process is the cause: this is a PeerError, or a collective failed.

    Torch has types for what its store and NCCL say, and none for gloo: there it is a RuntimeError
    that torch.distributed, or the wait for work that it has begun, has raised. What a rank computes
    wrongly by itself is raised elsewhere.
    """
    if isinstance(error, PeerError):
        return True
    if any(kind.__module__ == "torch.distributed" for kind in type(error).__mro__):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, RuntimeError) or not frames:
        return False
    return _COLLECTIVES in frames[-1].filename or ".wait(" in (frames[-1].line or "")

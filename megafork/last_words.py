"""What a process that ends in failure leaves for those who ask why: one line, in a file.

torchrun's agent names a file for every rank in $TORCHELASTIC_ERROR_FILE and reads it when the rank
has ended. A rank that leaves none has ended because of another one, or was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

from megafork.printable import printable

VARIABLE = "TORCHELASTIC_ERROR_FILE"
_LONGEST = 2000
_BROKEN = re.compile(r"closed by peer|connection (was )?reset|broken pipe|connection closed", re.I)
"""What collectives and stores say when the process at the other end has ended."""


def leave(message: str, log: str | None = None) -> None:
    """The first words of a process stay; none are left where nobody asked for them.

    log: the file that has more.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    words = {
        "message": printable(_first_line(message)),
        "extraInfo": {"timestamp": int(time.time()), "log": log},
    }
    with contextlib.suppress(OSError), open(path, "x") as file:  # the status tells enough
        json.dump({"message": words}, file)


def _first_line(message: str) -> str:
    """What fits the last line of a job's output."""
    lines = message.strip().splitlines() or [""]
    return lines[0][:_LONGEST]


def read(path: Path) -> tuple[str, str | None] | None:
    """The message, and the log that has more, of the process that had `path` for its words."""
    try:
        words = json.loads(path.read_text())["message"]
        return words["message"], words["extraInfo"].get("log")
    except (OSError, ValueError, TypeError, KeyError):  # torch's own way to write them is another
        return None


def of_exception(error: BaseException) -> str | None:
    """The line for an exception that nobody caught; None for another process's end."""
    if _BROKEN.search(str(error)):
        return None
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0]}" if first else type(error).__name__

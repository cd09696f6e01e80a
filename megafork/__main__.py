"""`megafork ...` and `python -m megafork ...`: the command line."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from megafork.errors import USER_ERROR
from megafork.system.extras import missing


def main() -> None:
    """Run the command line; where a package is missing, name it and the extra that brings it."""
    signal.signal(signal.SIGINT, _end_by_ctrl_c)
    try:
        from megafork.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        package = missing(error.name)
        if package is None:
            raise
        print(f"error: this command needs {package}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)


def _end_by_ctrl_c(number: int, frame: FrameType | None) -> None:
    """End where nothing has to be saved, with one line and without a traceback."""
    if "RANK" not in os.environ:  # else the process that started the ranks tells it
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()

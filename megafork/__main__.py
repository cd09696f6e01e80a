"""`megafork ...` and `python -m megafork ...`: the command line."""

from __future__ import annotations

import sys

from megafork.errors import USER_ERROR
from megafork.system.extras import missing


def main() -> None:
    """Run the command line; where a package is missing, name it and the extra that brings it."""
    try:
        from megafork.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        package = missing(error.name)
        if package is None:
            raise
        print(f"error: this command needs {package}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()

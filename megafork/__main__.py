"""`megafork ...` and `python -m megafork ...`: the command line, where its packages are there."""

from __future__ import annotations

import sys

from megafork.errors import USER_ERROR
from megafork.system.extras import extra_with


def main() -> None:
    """Run the command line. Says which extra has a package of megafork's that is missing."""
    try:
        from megafork.cli import main as command_line

        command_line()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = extra_with(missing)
        if extra is None:
            raise
        print(
            f"error: this command needs {missing}, which is not installed: "
            f"pip install 'megafork[{extra}]'",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()

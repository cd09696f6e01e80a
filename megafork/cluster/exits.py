"""The end of a command: its exit status, and the one message that says why."""

from __future__ import annotations

import errno
import os
import resource
import sys
from collections.abc import Callable
from typing import NoReturn

from megafork.cluster import launch
from megafork.errors import USER_ERROR, Interrupted, PeerError, UserError
from megafork.system import failure_file
from megafork.system.printable import printable
from megafork.system.signals import INTERRUPTED

_FIX = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and start it again"
) | dict.fromkeys(
    (errno.EMFILE, errno.ENFILE), "raise the number of open files (ulimit -n) and start it again"
)
MOST_FILES = 65_536
"""The most that a process asks for: a higher limit only slows down programs that close every file
that they could have open"""
FEWEST_FILES = 256
"""The fewest that a process can work with: the collectives of one rank alone take dozens"""


def run(command: Callable[[], object]) -> None:
    """Run the command, and exit as its failure asks for.

    A UserError, a full disk and too few open files are one message on stderr and exit status 2. A
    run that a signal ended exits with 75.
    """
    try:
        _allow_open_files()
        command()
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(printable(str(stop)), file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in _FIX:
            _leave_words(error)
            raise
        _end_with(f"{error}: {_FIX[error.errno]}")
    except PeerError as error:
        failure_file.leave(str(error), status=USER_ERROR, own=False)
        sys.exit(USER_ERROR)
    except UserError as error:
        _end_with(str(error))
    except Exception as error:
        _leave_words(error)
        raise


def _allow_open_files() -> None:
    """Raise the limit of open files to MOST_FILES, or as far as this process may.

    Raises UserError where that is less than FEWEST_FILES.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < FEWEST_FILES:
        raise UserError(
            f"this process may have {allowed} files open (ulimit -n), and needs {FEWEST_FILES}: "
            "raise the limit, `ulimit -n 4096`"
        )


def _leave_words(error: Exception) -> None:
    own = not failure_file.follows_from_a_peer(error)
    failure_file.leave(failure_file.of_exception(error), status=1, own=own)


def _end_with(message: str) -> NoReturn:
    """Leave the message as last words, print it where nobody else does, and exit with status 2.

    All ranks may find the same, and it is told once: by the launcher, which reads their last words,
    or by rank 0 of a world that somebody else started. A rank that could not leave words, or has a
    log of its own, prints the message in any case.
    """
    is_left = failure_file.leave(message, status=USER_ERROR)
    rank = int(os.environ.get("RANK", "0"))
    if not is_left or launch.tells() or launch.JOINED in os.environ:
        print(launch.error_of(rank, message), file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)

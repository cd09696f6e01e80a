"""Signals that ask a run to end: SIGTERM and SIGUSR1, which Slurm and clouds send before they kill,
and SIGINT, which a terminal sends at Ctrl-C. A second Ctrl-C ends the process at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, NoReturn, Self, TypeVar

from megafork.errors import Interrupted

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 75
"""Exit status of a run that a signal ended and that can go on (EX_TEMPFAIL of sysexits.h)."""
LEFT = 128 + signal.SIGINT
"""Exit status after a second Ctrl-C"""
STOP_FILE = "MEGAFORK_STOP_FILE"
"""Names a file; when it appears, that is a SIGUSR1, which would be lost during the imports"""
_LOOK_S = 0.5


def name_of(number: int) -> str:
    """Return a signal's name as people know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def tell_first_ctrl_c() -> None:
    print("Ctrl-C: the run is ending; a second Ctrl-C leaves at once", file=sys.stderr, flush=True)


def leave_at_once(*_: object) -> NoReturn:
    """End this process as if it were killed: what it started notices, and ends too."""
    print("left at once after a second Ctrl-C", file=sys.stderr, flush=True)
    os._exit(LEFT)


class Interruption:
    """Handles the signals that ask a run to end, inside its `with`.

    The first one ends the process, wherever the main thread is. After `defer` it is only noted, and
    cancels what `run` runs. Outside, the signals have the meaning that they had before; but once a
    run was interrupted they are ignored, so that a second one does not cut its end short: but for a
    second Ctrl-C, which leaves at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal"""
        self._is_deferred = False
        self._tell: Callable[[str], None] = lambda name: None
        self._give_up: Callable[[], object] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._left = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if path := os.environ.get(STOP_FILE):
            self._watcher = threading.Thread(target=self._watch, args=(path,), daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._left.set()
        if self._watcher is not None:
            self._watcher.join()
        interrupted = self.received is not None or kind is Interrupted  # by another rank's signal
        for number, handler in self._before.items():
            after = leave_at_once if number == signal.SIGINT else signal.SIG_IGN
            signal.signal(number, after if interrupted else handler)

    def _watch(self, path: str) -> None:
        while not self._left.wait(_LOOK_S):
            if os.path.exists(path):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    def defer(self, tell: Callable[[str], None] | None = None) -> None:
        """Only note signals from here on, because there is something to save first.

        tell: is called with the signal's name; the stop file is then another process's to watch.
        Raises Interrupted where a signal came, whose end of the process a destructor has swallowed.
        """
        self.check()
        if tell is not None:
            self._tell = tell
            self._left.set()
        self._is_deferred = True

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                leave_at_once()
            return
        self.received = name_of(number)
        if not self._is_deferred:
            if os.environ.get("RANK", "0") == "0":
                print(f"stopped by {self.received} while it started", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED)  # no `except Exception` on the way may take it for a fault
        if number == signal.SIGINT and "RANK" not in os.environ:
            tell_first_ctrl_c()
        self._tell(self.received)
        if self._give_up is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._give_up()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on an event loop; a signal cancels it. Raises Interrupted after a signal."""
        return asyncio.run(self._unless_received(work))

    async def _unless_received(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        self._give_up = lambda: loop.call_soon_threadsafe(task.cancel)
        if self.received is not None:  # before the line above, or long ago
            task.cancel()
        try:
            result = await task
        except asyncio.CancelledError:
            if self.received is None:
                raise
            raise Interrupted(self.received) from None
        finally:
            self._give_up = None
        self.check()
        return result


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have a signal raise SystemExit, so that what is under way is ended and cleaned up."""

    def end(number: int, frame: FrameType | None) -> None:
        print(f"stopped by {name_of(number)}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

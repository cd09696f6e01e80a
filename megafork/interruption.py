"""SIGTERM and SIGUSR1 ask a run to end: Slurm and clouds send them before they kill."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Self, TypeVar

from megafork.errors import Interrupted

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Inside its `with` the signals end nothing: the first one is noted, and generation given up.

    For the main thread. Afterwards they have the meaning that they had before; if one came they
    are ignored, so that a second does not cut the process's end short.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal"""
        self._give_up: Callable[[], object] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if self.received is None else signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            if self._give_up is not None:
                self._give_up()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """`asyncio.run`, cancelled by a signal. Raises Interrupted then, and after one."""

        async def until_signal() -> T:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            self._give_up = lambda: loop.call_soon_threadsafe(task.cancel)
            if self.received is not None:  # before the line above, or long ago
                task.cancel()
            return await work

        try:
            return asyncio.run(until_signal())
        except asyncio.CancelledError:
            if self.received is None:
                raise
            raise Interrupted(self.received) from None
        finally:
            self._give_up = None

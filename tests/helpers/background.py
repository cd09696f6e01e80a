"""An event loop in a thread of its own: generation goes on while the main thread trains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """Work that runs on a `BackgroundLoop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[T] | None = None
        self._ended: Future[T] = Future()

    def result(self) -> T:
        """Wait for it. Raises what it raised; CancelledError when it was cancelled."""
        return self._ended.result()

    def cancel(self) -> None:
        """Ask it to end; it is over, and cleaned up after, when `result` returns."""
        self._loop.call_soon_threadsafe(self._cancel)

    async def ended(self) -> None:
        """For other work of the same loop: wait for it. Raises what it raised."""
        assert self._task is not None  # it was submitted before
        await asyncio.shield(self._task)

    def _cancel(self) -> None:  # on the loop, and so after _start
        assert self._task is not None
        self._task.cancel()

    def _start(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self._ended.set_exception(CancelledError())
        elif error := task.exception():
            self._ended.set_exception(error)
        else:
            self._ended.set_result(task.result())


class BackgroundLoop:
    """Runs coroutines until the end of its `with`, where what is left is cancelled."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def submit(self, work: Coroutine[Any, Any, T]) -> Job[T]:
        job: Job[T] = Job(self._loop)
        self._loop.call_soon_threadsafe(job._start, work)
        return job

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop):  # cancels what is left and closes
            self._loop.run_forever()

"""A signal's request that the run ends, for work that waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """A signal asked the run to end."""


class Stop:
    """A signal's request to end the run, if there was one. All but `check` needs the event loop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal"""
        self.ends_are_expected = False
        """Servers and verifiers that end are no news: nothing is generated any more"""
        self._asked = asyncio.Event()

    def ask(self, name: str) -> None:
        if self.signal is None:
            self.signal = name
            self.expect_ends()
            self._asked.set()

    def expect_ends(self) -> None:
        self.ends_are_expected = True

    def check(self) -> None:
        """Raise Stopped if the run is to end."""
        if self.signal is not None:
            raise Stopped(self.signal)

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns. Raises Stopped, with the work given up, after a signal."""
        working = asyncio.create_task(work)
        asked = asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
        if self.signal is not None:
            if not working.cancelled():
                working.exception()  # or asyncio complains that nobody has looked
            raise Stopped(self.signal)
        return working.result()

"""The check behind a server's /health: can its engine generate a token? Imports no vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

HEALTH_S = 8.0
"""For an answer, or for one token of an idle engine; less than those who ask /health wait"""
SILENCE_S = 300.0
"""The longest step of an engine that has answered before: it answers between steps alone.
On a CPU the prompts of one batch took a model of 0.5B parameters 43 s and more."""


class Pulse:
    """Checks that the engine can generate a token, which a living process alone does not show.

    An idle engine is asked for one. While it generates, is paused or sleeps, its loop only has to
    answer. Once it has answered, it may be silent for SILENCE_S; and while it is administered, as
    when weights come in, for as long as that takes.
    """

    def __init__(self, one_token: Callable[[Any], Awaitable[None]]) -> None:
        """one_token: has the engine that it is given generate one."""
        self._one_token = one_token
        self._num_generating = self._num_administering = 0
        self._asking: asyncio.Task[str | None] | None = None
        self._has_answered = False
        self._silent_since: float | None = None

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        self._num_generating += 1
        try:
            yield
        finally:
            self._num_generating -= 1

    @contextlib.contextmanager
    def administration(self) -> Iterator[None]:
        self._num_administering += 1
        try:
            yield
        finally:
            self._num_administering -= 1

    async def ailment(self, engine: Any) -> str | None:
        """Return why the engine cannot generate, or None. Callers at a time share the answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask(engine))
        return await asyncio.shield(self._asking)

    async def _ask(self, engine: Any) -> str | None:
        asked_at = time.monotonic()
        try:
            await engine.check_health()
            async with asyncio.timeout(HEALTH_S):
                if not self._num_administering and not await self._is_busy(engine):
                    await self._one_token(engine)
        except TimeoutError:
            return self._silence(asked_at)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self._has_answered, self._silent_since = True, None
        return None

    def _silence(self, asked_at: float) -> str | None:
        """Return what ails an engine that has not answered in time; None if it may be silent."""
        if self._num_administering:
            self._silent_since = None
            return None
        if not self._has_answered:
            return f"the engine has generated no token within {HEALTH_S:g} s"
        if self._silent_since is None:
            self._silent_since = asked_at
        seconds = time.monotonic() - self._silent_since
        return None if seconds < SILENCE_S else f"the engine has not answered for {seconds:.0f} s"

    async def _is_busy(self, engine: Any) -> bool:
        return await engine.is_sleeping() or self._num_generating > 0

"""Clients and fleets for plain code: each call runs a coroutine to its end."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from megafork.rollout.fleet import Fleet
from tests.helpers.background import BackgroundLoop, Job

T = TypeVar("T")


class Blocking:
    """A `RolloutClient`, whose methods block; safe in any thread."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.wrapped, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *arguments, **options: self.run(found(*arguments, **options))


class BlockingFleet(Blocking):
    """A fleet with an event loop of its own, in a thread. Enter it before use."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._loop = BackgroundLoop()

    def __enter__(self) -> Self:
        self._loop.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.run(self.wrapped.__aexit__(*exc_info))
        self._loop.__exit__(*exc_info)

    def submit(self, work: Coroutine[Any, Any, T]) -> Job[T]:
        return self._loop.submit(work)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.submit(work).result()

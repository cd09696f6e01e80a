"""The seconds of a step, by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of each phase of a step; `enter` is told when one begins.

    A phase within another one is not counted in that.
    """

    enter: Callable[[str], None] = lambda phase: None
    seconds: dict[str, float] = field(default_factory=dict)
    _within: float = 0.0

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        self.enter(phase)
        started, outer = time.monotonic(), self._within
        self._within = 0.0
        try:
            yield
        except BaseException:
            self._within += outer
            raise
        taken = time.monotonic() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + taken - self._within
        self._within = outer + taken

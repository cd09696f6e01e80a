"""The progress of a generation, for whoever waits minutes for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

EVERY_S = 10.0


@dataclass
class Tally:
    """Counts the groups that were asked for and those that are done, with the tokens of these."""

    groups: int = 0
    done: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, num_tokens: int) -> None:
        """Count a group that is done."""
        self.done += 1
        self.tokens += num_tokens

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-3)
        return f"{self.done} of {self.groups} groups, {self.tokens / seconds:.0f} tokens/s"


async def tell_regularly(tally: Callable[[], Tally], tell: Callable[[str], None]) -> NoReturn:
    """Tell the tally every EVERY_S seconds, until cancelled."""
    while True:
        await asyncio.sleep(EVERY_S)
        tell(str(tally()))

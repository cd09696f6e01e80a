"""How far a generation is, for whoever waits minutes for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

EVERY_S = 10.0


@dataclass
class Tally:
    """Groups that were asked for and those that are done, with the tokens of these."""

    groups: int = 0
    done: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, num_tokens: int) -> None:
        """A group is done."""
        self.done += 1
        self.tokens += num_tokens

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-3)
        return f"{self.done} of {self.groups} groups, {self.tokens / seconds:.0f} tokens/s"


async def tell_regularly(tally: Callable[[], Tally], tell: Callable[[str], None]) -> NoReturn:
    """Every EVERY_S seconds, until it is cancelled."""
    while True:
        await asyncio.sleep(EVERY_S)
        tell(str(tally()))

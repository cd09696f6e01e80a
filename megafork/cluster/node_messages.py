"""The plan that every launcher has from its command line, and the messages of launchers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOST = 69
"""Exit status of a run that lost a machine and can go on on others (EX_UNAVAILABLE)."""
BEAT_S = 1.0
MAX_LINE = 1 << 16


@dataclass(frozen=True)
class Plan:
    training: tuple[str, ...]
    """Names of the machines with ranks; the first one coordinates"""
    serving: tuple[str, ...]
    port: int
    """The coordinator's port, for the other launchers"""
    key: bytes
    """Shared secret of the launchers"""
    logs: Path
    startup_s: float
    """Seconds for all launchers to find each other"""
    lost_after_s: float
    """A machine that was silent for so long is lost"""

    @property
    def first_node(self) -> str:
        return self.training[0]

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.training + self.serving

    def proof(self, node: str) -> str:
        return hmac.new(self.key, node.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Failure:
    """An end of one machine's processes that is no success."""

    node: str
    status: int
    """Exit status, or minus the signal's number"""
    words: str | None
    """Why, where it is known"""
    log: str | None
    own: bool = True
    """It is not the consequence of what happened elsewhere"""

    def told(self) -> str:
        return f"{self.node}: {self.words or f'ended with status {self.status}'}"


def pack(**message: Any) -> bytes:
    """Return the message as it is sent: one line of JSON."""
    return json.dumps(message).encode() + b"\n"


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Return the next message; None when the other side is gone or talks nonsense."""
    try:
        line = await reader.readline()
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None

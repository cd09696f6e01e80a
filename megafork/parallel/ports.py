"""TCP ports for servers that are about to start. Imports no torch."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that was free a moment ago.

    From below the range that the system gives to outgoing connections (32768 upwards): any of those
    could take it before its server binds it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port

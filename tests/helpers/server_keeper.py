"""Keeps one server for the tests of a whole session (see shared_servers.py).

    python -m tests.helpers.server_keeper SESSION_PID OPTIONS

The process that starts a keeper may end while other processes still use the server, so nothing but
the end of process SESSION_PID ends it, in whichever way that one ends: the kernel tells. If the
keeper dies itself, the server's supervisor ends the server.

It prints one line when the server is up, or when it could not start.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from typing import Any

from megafork.errors import UserError
from megafork.rollout.vllm_server import VllmServer


def start(server: VllmServer) -> None:
    try:
        server.start()
    except UserError as error:
        told: dict[str, Any] = {"error": str(error)}
    else:
        told = {
            "url": server.url,
            "api_key": server.api_key,
            "log_path": str(server.log_path),
            "process_group": server.process_group,
        }
    print(json.dumps(told), flush=True)


def main(session_pid: int, options: dict[str, Any]) -> None:
    session = os.pidfd_open(session_pid)
    server = VllmServer(**options)
    threading.Thread(target=start, args=(server,), daemon=True).start()
    select.select([session], [], [])  # readable once the process has ended
    server.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))

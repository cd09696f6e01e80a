"""Keeps an inference server from outliving the trainer.

    python -m megafork.rollout.supervisor COMMAND...

The server runs in the supervisor's own process group (a session of its own, so a terminal's Ctrl-C
does not reach it). The group is ended, TERM first and KILL after a grace period, when

- the trainer closes the supervisor's stdin, which also happens when the trainer is kill -9'ed,
- the trainer is gone although some other process still holds the pipe (a forked worker may),
- the server exits by itself, leaving engine or worker processes behind,
- the supervisor gets SIGTERM or SIGINT.

The last KILL hits the supervisor too, so nothing of the group is left. Before it the folder of the
server's sockets and temporary files is removed. Standard library only.
"""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time

GRACE_S = 5.0  # between TERM and KILL
FOLDER = "MEGAFORK_SERVER_FOLDER"
"""Names what is removed with the server"""
_POLL_S = 0.25


def _wait_for_reason(server: subprocess.Popen, trainer_pid: int, signals: list[int]) -> str:
    """Block until the group has to end; returns why."""
    while server.poll() is None:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable and not os.read(0, 4096):
            return "the trainer closed the pipe"
        if os.getppid() != trainer_pid:
            return "the trainer is gone"
        if signals:
            return f"got {signal.Signals(signals[0]).name}"
    return _told_of_the_end(server.returncode)


def _told_of_the_end(status: int) -> str:
    """Say how the server ended, and how large it was.

    Where memory runs out, the kernel ends whoever is largest, and tells only its own log.
    """
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    return f"the server {how}; its largest process had {most:.1f} GiB"


def _end_group(server: subprocess.Popen) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    try:
        server.wait(GRACE_S)
        time.sleep(_POLL_S)  # its children got the same TERM
    except subprocess.TimeoutExpired:
        pass
    if folder := os.environ.get(FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main(command: list[str]) -> None:
    trainer_pid = os.getppid()
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the server's too: the trainer decides
    signals: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda received, frame: signals.append(received))
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    reason = _wait_for_reason(server, trainer_pid, signals)
    print(f"supervisor: {reason}; ending the process group", flush=True)
    _end_group(server)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A process of the run that its rank starts: it lives as long as the pipe from that rank.

It has a session of its own, so that a signal to the ranks' process groups is theirs alone, and is
told what to do in one line of JSON on its stdin. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, Self

from megafork.system.signals import SIGNALS

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
_START += "from {module} import main; main()"
_END_S = 30.0
"""Servers take a while to end"""
_SETTLED_S = 5.0
"""Until a process whose connection is closed has ended too"""


class Child:
    """The process, as its rank sees it. Close it."""

    def __init__(self, module: str, told: dict[str, Any]) -> None:
        """Start the process. module: has the `main` that it runs; `read_order` tells it `told`."""
        reading, writing = os.pipe()
        with open(writing, "wb", buffering=0):
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START.format(module=module), json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                pass_fds=[writing],
                start_new_session=True,
            )
        self._answers = open(reading, "rb")  # noqa: SIM115
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as its connection tells
            self.process.stdin.write(json.dumps(told | {"answers": writing}).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait for what it has to say when it is up; None where it ends or stays without a word."""
        if not select.select([self._answers], [], [], timeout_s)[0]:
            return None
        line = self._answers.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self) -> str:
        """Say how it ended. One that goes on, though nothing is heard of it, is ended."""
        try:
            status = self.process.wait(_SETTLED_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "it still ran, and was ended"
        if status < 0:
            return f"it was killed by {signal.Signals(-status).name}"
        return f"it exited with status {status}"

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_order() -> dict[str, Any]:
    """Read, in the child, what it was told. Signals are the ranks' from here on.

    Where its rank ended before it had said all, the child ends too, without a word.
    """
    # Slurm and a terminal signal every process: the trainer alone decides what follows from it.
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        sys.exit(0)
    return json.loads(line)


def answer_rank(order: dict[str, Any], answer: dict[str, Any]) -> None:
    """Say, in the child, that it is up."""
    with contextlib.suppress(BrokenPipeError), open(order["answers"], "wb") as answers:
        answers.write(json.dumps(answer).encode() + b"\n")


def run_until_the_rank_ends(work: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
    """Do `work`, in the child, until the rank closes the pipe or is gone, which cancels it; exit.

    No thread that still waits, for a disk or a node's servers, holds the exit up.
    """
    try:
        asyncio.run(_exit_after(work))
    finally:
        os._exit(1)


async def _exit_after(work: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(0, ended.set)  # nothing more is written to it
    working = asyncio.create_task(work())
    ending = asyncio.create_task(ended.wait())
    await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(0)
    working.cancel()
    status = 0
    try:
        await working
    except asyncio.CancelledError:
        pass
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

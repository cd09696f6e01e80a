"""A run that is under way, which a test watches, signals and kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil

from tests.helpers.commands import MARK, ROOT, Moment, environment
from tests.helpers.forks import Fork


class LiveRun:
    """`megafork ARGUMENTS` in a session of its own; what is left of it at the end is killed.

    executed: it is started as a user does, and no fork of this process.
    """

    def __init__(
        self, run_dir: Path, *arguments: object, executed: bool = False, **variables: str
    ) -> None:
        self.run_dir = run_dir
        self._output = run_dir.parent / f"{run_dir.name}.out"
        words = tuple(map(str, arguments))
        told = environment(run_dir) | variables
        self.process: Fork | subprocess.Popen[bytes]
        with self._output.open("w") as output:
            if executed:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "megafork", *words],
                    cwd=ROOT,
                    env=told,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            else:
                self.process = Fork(
                    words, told, (MARK,), stdout=output, stderr=output, session=True
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @property
    def told(self) -> str:
        """All that it has printed, on both streams."""
        return self._output.read_text()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The steps that it has written down so far."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def journal(self, step: int) -> Path:
        return self.run_dir / "rollouts" / f"step_{step:06d}.journal"

    def wait_for(self, condition: Callable[[], Any], seconds: float = 400) -> None:
        """Until the condition holds, which it has to while the run is there."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.told
            assert time.monotonic() < deadline, self.told
            time.sleep(0.005)

    def end(self, seconds: float = 400) -> int:
        """Its exit status, once it has ended by itself."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.told) from None

    def find(self, word: str) -> list[psutil.Process]:
        """Its processes with `word` in their command line."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in children if word in process.cmdline()]

    def kill_server(self, number: int = 0) -> None:
        """kill -9 of a server, its workers and what watches it."""
        os.killpg(self.find("megafork.rollout.supervisor")[number].pid, signal.SIGKILL)

    def signal(self, *numbers: int) -> None:
        """To the process that was started."""
        for number in numbers:
            self.process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """To every process, as Slurm does."""
        for member in [self.process, *psutil.Process(self.process.pid).children(recursive=True)]:
            os.kill(member.pid, number)

    def kill(self) -> None:
        """kill -9 of all in its session at once: the launcher and the ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # a fork that has no session yet
        self.process.wait()


@contextlib.contextmanager
def middle_of(
    version: int, run_dir: Path, *arguments: object, servers: int = 1
) -> Iterator[tuple[LiveRun, Moment]]:
    """A run on tiny engines whose servers stand in the middle of what this policy generates."""
    folder = run_dir.parent / f"{run_dir.name}-moments"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    moment = Moment(folder, version)
    with LiveRun(run_dir, *arguments, **moment.variables) as run:
        run.wait_for(lambda: moment.has_come(servers))
        yield run, moment

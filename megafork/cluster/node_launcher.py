"""The launcher of one machine: starts its processes, and ends them when the run is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil

from megafork.cluster.launch import ENDPOINT
from megafork.cluster.node_messages import BEAT_S, LOST, MAX_LINE, Failure, Plan, pack, receive
from megafork.system import failure_file
from megafork.system.child_process import adopt_orphans, die_with_parent
from megafork.system.signals import INTERRUPTED, SIGNALS, STOP_FILE

_GRACE_S = 10.0
"""For servers to end by themselves when all went well"""
_KILL_S = 10.0
_NOTE_S = 5.0


@dataclass
class Work:
    """A process of this machine, and what came of it."""

    name: str
    command: Sequence[str]
    log: Path | None = None
    """The file that takes its output; None: ours takes it"""
    restarts: int = 0
    """How often it is started again when it ends"""
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def start(self, folder: Path, environment: dict[str, str]) -> None:
        """Start the process. folder: this machine's own, for the process's last words."""
        self.words = folder / f"{self.name}.words"
        self.words.unlink(missing_ok=True)
        told = {"PYTHONUNBUFFERED": "1", failure_file.VARIABLE: str(self.words)}
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self.log.open("ab")) if self.log is not None else None
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                env=os.environ | self.environment | environment | told,
                preexec_fn=partial(_as_child, os.getpid()),
            )

    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def failure(self, node: str) -> Failure:
        assert self.process is not None
        status, log = self.process.returncode, str(self.log) if self.log is not None else None
        if (words := failure_file.read(self.words)) is not None:
            return Failure(node, status, words.line, words.log or log, words.own)
        if status < 0:
            return Failure(node, status, f"{self.name} was killed by signal {-status}", log)
        return Failure(node, status, None, log)


class NodeLauncher:
    """The launcher of one machine. `run` returns the exit status of the whole run."""

    def __init__(
        self, plan: Plan, node: str, works: list[Work], refused: Failure | None = None
    ) -> None:
        self.plan, self.node, self.works = plan, node, works
        self._heard = time.monotonic()
        self._environment: dict[str, str] = {}  # of the works, once they are started
        self._end: int | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="megafork-launcher-"))
        self._stop_file = self._folder / "stop"
        self._asked_to_stop = False
        self._not_started = refused
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> int:
        adopt_orphans()  # what loses its parent stays ours
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._ask_to_stop)
        try:
            return await self._run()
        finally:
            await self._kill_all()  # before the coordinator hears that we are gone
            if self._writer is not None:
                self._writer.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _run(self) -> int:
        connection = await self._connect()
        if connection is None:
            return await self._lose(f"no answer within {self.plan.startup_s:g} s")
        reader, writer = connection
        self._writer = writer
        listening = asyncio.create_task(self._listen(reader))
        writer.write(pack(hello=self.node, proof=self.plan.proof(self.node)))
        ended = False
        while self._end is None:
            writer.write(pack(stop=1) if self._asked_to_stop else pack(beat=1))
            if self._environment and not ended:
                ended = self._look_after(writer)
            if listening.done():
                return await self._lose("its launcher is gone")
            if time.monotonic() - self._heard > self.plan.lost_after_s:
                return await self._lose(f"nothing heard for {self.plan.lost_after_s:g} s")
            await asyncio.sleep(BEAT_S / 4)
        if self._end in (0, INTERRUPTED):
            await self._part()
        return self._end

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        deadline = time.monotonic() + self.plan.startup_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                opening = asyncio.open_connection(
                    self.plan.first_node, self.plan.port, limit=MAX_LINE
                )
                connection = await asyncio.wait_for(opening, 5.0)
                self._heard = time.monotonic()
                return connection
            await asyncio.sleep(0.2)
        return None

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while self._end is None and (message := await receive(reader)) is not None:
            self._heard = time.monotonic()
            if "go" in message:
                self._environment = {STOP_FILE: str(self._stop_file), ENDPOINT: message["go"]}
                for work in self.works:
                    self._start(work)
            if "stop" in message:
                self._stop_file.touch()
            if "end" in message:
                self._end = int(message["end"])

    def _look_after(self, writer: asyncio.StreamWriter) -> bool:
        """Restart what may be; tell the coordinator, and return whether the work has ended."""
        if self._not_started is not None:
            writer.write(pack(ended=asdict(self._not_started)))
            return True
        for work in self.works:
            if not work.has_ended():
                continue
            if self._asked_to_stop and self.node in self.plan.serving:
                continue  # it was asked, too
            failure = work.failure(self.node)
            if work.restarts:
                work.restarts -= 1
                print(f"warning: {failure.told()}; it is started again", file=sys.stderr)
                self._start(work)
                continue
            is_done = failure.status == 0 and self.node in self.plan.training
            writer.write(pack(ended=None if is_done else asdict(failure)))
            return True
        return False

    def _start(self, work: Work) -> None:
        try:
            work.start(self._folder, self._environment)
        except OSError as error:
            words = f"{work.name} cannot be started: {error}"
            self._not_started = Failure(self.node, 1, words, None)

    def _ask_to_stop(self) -> None:
        self._asked_to_stop = True

    async def _lose(self, why: str) -> int:
        told = f"{self.node} lost touch with {self.plan.first_node}:{self.plan.port}: {why}"
        await self._kill_all()  # first: the logs' file system may be what we are cut off from
        print(f"error: {told}", file=sys.stderr, flush=True)
        writing = threading.Thread(target=self._note, args=(told,), daemon=True)
        writing.start()
        writing.join(_NOTE_S)
        return LOST

    def _note(self, told: str) -> None:
        with contextlib.suppress(OSError):
            (self.plan.logs / f"launcher-{self.node}.log").write_text(told + "\n")

    async def _part(self) -> None:
        """Ask the processes that still run to end, and give them a moment for it."""
        for work in self.works:
            if work.process is not None and not work.has_ended():
                work.process.terminate()
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and not all(work.has_ended() for work in self.works):
            await asyncio.sleep(0.1)

    async def _kill_all(self) -> None:
        """Send SIGKILL to all that came of our processes, until nothing is left."""
        deadline = time.monotonic() + _KILL_S
        while time.monotonic() < deadline:
            left = psutil.Process().children(recursive=True)
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            for work in self.works:
                work.has_ended()  # reaps it
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not left:
                return
            await asyncio.sleep(0.05)


def _as_child(launcher: int) -> None:
    die_with_parent(launcher)
    # A launcher sends it to all at once; what can act on it sets a handler, the rest goes on.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

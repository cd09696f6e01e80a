"""Verifiers in processes of their own: each response has a deadline, and no worker's end is ours.

A thread for each worker hands it one response at a time over a socket and kills it at the deadline.
Nothing is shared between workers, so one that dies at any moment (out of memory, a segmentation
fault) takes nothing with it. pebble.ProcessPool, which shares a pipe and its locks, gives up the
whole pool when an idle worker is killed, or a worker ends at once after taking a task.

What comes back is JSON: nothing that a worker says is unpickled or evaluated.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

from megafork.errors import UserError

Failure = Literal["timeout", "memory", "death", "error"]
"""Too long, too much memory, the end of its process, an exception"""
_STARTUP_S = 300.0
_STARTS = 3
"""How often a worker that ends while it starts, without a word, is tried"""
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from megafork.rewards.worker "
_START += "import main; main(*json.loads(sys.argv[2]))"
_OF_TORCHRUN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_.*"
)


@dataclass(frozen=True)
class Outcome:
    """Of one response: the verifiers' scores, or why there are none."""

    scores: list[float]
    failure: Failure | None = None
    cause: str = ""


class WorkerPool:
    """Workers with the verifiers `names`. Close it; without that they end with this process."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        workers: int,
        timeout_s: float,
        memory_mib: int,
        places: Sequence[str] | None = None,
    ) -> None:
        """places: where verifiers that ask for it look for the answer."""
        self._names, self._timeout_s, self._memory_mib = list(names), timeout_s, memory_mib
        self._places = None if places is None else list(places)
        self._tasks: SimpleQueue[tuple[Future[Outcome], bytes] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._running: set[_Worker] = set()
        self._closed = False
        # The kernel ends a worker with the thread that started it: these live as long as the pool.
        self._threads = [
            threading.Thread(target=self._serve, name=f"verifier-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, prompt: str, response: str, answer: str) -> Future[Outcome]:
        """From any thread. The deadline runs from when a worker has it; until then it can be
        cancelled at no cost. The future raises UserError for what the user must mend."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[Outcome] = Future()
        message = json.dumps([prompt, response, answer]).encode() + b"\n"
        self._tasks.put((future, message))
        return future

    def close(self) -> None:
        """End the workers now; what they had not answered is cancelled."""
        with self._lock:
            self._closed = True
            for worker in self._running:
                worker.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task[0].cancel()

    def _serve(self) -> None:
        """One worker and its successors."""
        worker: _Worker | None = None
        broken: UserError | None = None
        while not self._closed:
            if worker is None:  # before there is work: starting takes seconds
                try:
                    worker, broken = self._start(), None
                except UserError as error:
                    broken = error
                except CancelledError:
                    break
            task = self._tasks.get()
            if task is None:
                break
            future, message = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if worker is None:
                    assert broken is not None
                    raise broken
                outcome = worker.ask(message, self._timeout_s)
            except BaseException as error:
                future.set_exception(error)
                continue
            if outcome.failure in ("timeout", "memory", "death"):
                self._end(worker)
                worker = None
            if outcome.failure is not None and self._closed:
                future.set_exception(CancelledError())
            else:
                future.set_result(outcome)
        if worker is not None:
            self._end(worker)

    def _start(self) -> _Worker:
        for _ in range(_STARTS):
            with self._lock:
                if self._closed:
                    raise CancelledError
                try:
                    worker = _Worker(self._names, self._memory_mib, self._places)
                except OSError as error:  # a full process table, no memory, no file descriptor
                    raise UserError(
                        f"a worker for reward.verifier={', '.join(self._names)} cannot be started: "
                        f"{error}. Make room for it, or lower reward.workers={len(self._threads)}"
                    ) from None
                self._running.add(worker)
            try:
                said = worker.exchange(b"", _STARTUP_S)
            except TimeoutError:
                self._end(worker)
                raise UserError(
                    f"reward.verifier={', '.join(self._names)} was not imported within "
                    f"{_STARTUP_S:g} s: do in the function's first call what takes so long"
                ) from None
            if said is not None and "ready" in said:
                return worker
            how = self._end(worker)
            if said is not None:
                raise UserError(said["unusable"])
        if self._closed:
            raise CancelledError
        raise UserError(
            f"a worker for reward.verifier={', '.join(self._names)} ended {how} while it started, "
            f"{_STARTS} times: try the import in a process of its own, or raise "
            f"reward.memory_mib={self._memory_mib}"
        )

    def _end(self, worker: _Worker) -> str:
        with self._lock:
            self._running.discard(worker)
        return worker.end()


class _Worker:
    """One process and our end of its socket."""

    def __init__(self, names: Sequence[str], memory_mib: int, places: Sequence[str] | None) -> None:
        self._socket, theirs = socket.socketpair()
        self._received = b""
        arguments = [theirs.fileno(), os.getpid(), memory_mib, list(names), places]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps(arguments)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # and a process group, with what it starts itself
            )

    def ask(self, message: bytes, timeout_s: float) -> Outcome:
        """Raises UserError when the verifier does."""
        try:
            said = self.exchange(message, timeout_s)
        except TimeoutError:
            return Outcome([], "timeout", f"no answer within {timeout_s:g} s")
        if said is None:
            return Outcome([], "death", f"its process ended {self.end()}")
        if "user_error" in said:
            raise UserError(said["user_error"])
        if "failure" in said:
            return Outcome([], said["failure"], said["cause"])
        return Outcome(said["scores"])

    def exchange(self, message: bytes, timeout_s: float) -> dict[str, Any] | None:
        """The next line after `message`; None: it died. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(message)
            while not self._received.endswith(b"\n"):
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
                part = self._socket.recv(1 << 16)
                if not part:
                    return None
                self._received += part
        except ConnectionError:
            return None
        line, self._received = self._received, b""
        try:
            return json.loads(line)
        except ValueError:  # something of the verifier's wrote on the socket
            return None

    def kill(self) -> None:
        if self._process.returncode is not None:  # the number may be another's by now
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Kill what is left of it; says how it ended."""
        self._socket.close()
        self.kill()  # before it is reaped: its group may have others; a status that it has stays
        status = self._process.wait()
        return f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def _environment() -> dict[str, str]:
    """Ours, without the trainer's world and its devices."""
    inherited = {k: v for k, v in os.environ.items() if not _OF_TORCHRUN.fullmatch(k)}
    return inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

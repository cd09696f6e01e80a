"""Verifiers in processes of their own: each response has a deadline, and no worker's end is ours.

A thread for each worker hands it one response at a time over a socket and kills it at the deadline.
Nothing is shared between workers, so one that dies at any moment (out of memory, a segmentation
fault) takes nothing with it. pebble.ProcessPool, which shares a pipe and its locks, gives up the
whole pool when an idle worker is killed, or a worker ends at once after taking a task.

What comes back is JSON: nothing that a worker says is unpickled or evaluated. A verifier runs in
the worker's own process and may write on its socket too. So every answer has its question's number,
is of bounded length, and is the only line since the question; whatever else comes ends the worker.
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
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

from megafork.errors import UserError

Failure = Literal["timeout", "memory", "death", "error"]
"""Too long, too much memory, the end of its process, an exception"""
NO_COLUMNS: Mapping[str, Any] = {}
_STARTUP_S = 300.0
_STARTS = 3
"""How often a worker that ends while it starts, without a word, is tried"""
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from megafork.verifiers.worker "
_START += "import main; main(*json.loads(sys.argv[2]))"
_LONGEST_ANSWER = 1 << 16
_PART = 1 << 14
_SHOWN = 200
_FAILURES = ("memory", "error")
"""That a worker tells of itself"""
_HANDED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TERM|PYTHON\w*|LD_LIBRARY_PATH"
    r"|LD_PRELOAD|VIRTUAL_ENV|CONDA_PREFIX|XDG_\w+|SSL_CERT_(FILE|DIR)|HF_(HOME|\w+_CACHE|\w*OFFLINE)"
    r"|(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|MEGAFORK_TEST_\w+"
)
"""Variables that hold no secret by their meaning; reward.environment names others"""


@dataclass(frozen=True)
class Outcome:
    """The verifiers' scores of one response, or the reason why there are none."""

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
        environment: Sequence[str] = (),
    ) -> None:
        """places: where verifiers that ask for it look for the answer. environment: variables of
        ours that the workers have too; see _HANDED_ON."""
        self._names, self._timeout_s, self._memory_mib = list(names), timeout_s, memory_mib
        self._places = None if places is None else list(places)
        self._environment = list(environment)
        self._tasks: SimpleQueue[tuple[Future[Outcome], list[Any]] | None] = SimpleQueue()
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

    def submit(
        self, prompt: str, response: str, answer: str, columns: Mapping[str, Any] = NO_COLUMNS
    ) -> Future[Outcome]:
        """Queue a response, from any thread. columns: further ones of its row, as JSON holds them.

        The deadline runs from when a worker has it; until then it can be cancelled at no cost. The
        future raises UserError for what the user must mend.
        """
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[Outcome] = Future()
        self._tasks.put((future, [prompt, response, answer, dict(columns)]))
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
        """Run one worker, start its successor when it ends, and hand it one response after the
        other."""
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
                if worker is not None and worker.has_spoken():
                    self._end(worker)
                    worker = None  # should the start fail
                    worker = self._start()
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
                    worker = _Worker(self._names, self._places, self._memory_mib, self._environment)
                except OSError as error:  # a full process table, no memory, no file descriptor
                    raise UserError(
                        f"a worker for reward.verifier={', '.join(self._names)} cannot be started: "
                        f"{error}. Make room for it, or lower reward.workers={len(self._threads)}"
                    ) from None
                self._running.add(worker)
            try:
                said = worker.exchange(None, _STARTUP_S)
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
    """A worker process and our end of its socket."""

    def __init__(
        self,
        names: Sequence[str],
        places: Sequence[str] | None,
        memory_mib: int,
        environment: Sequence[str],
    ) -> None:
        self._socket, theirs = socket.socketpair()
        self._num_asked, self._num_scores = 0, len(names)
        arguments = [theirs.fileno(), os.getpid(), memory_mib, list(names), places]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), json.dumps(arguments)],
                env=_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # and a process group, with what it starts itself
            )

    def ask(self, message: list[Any], timeout_s: float) -> Outcome:
        """Raises UserError when the verifier does."""
        try:
            said = self.exchange(message, timeout_s)
        except TimeoutError:
            return Outcome([], "timeout", f"no answer within {timeout_s:g} s")
        if said is None:
            return Outcome([], "death", f"its process ended {self.end()}")
        if "user_error" in said:
            raise UserError(str(said["user_error"]))
        if said.get("failure") in _FAILURES:
            return Outcome([], said["failure"], str(said.get("cause")))
        scores = said.get("scores")
        if isinstance(scores, list) and [type(s) for s in scores] == [float] * self._num_scores:
            return Outcome(scores)
        return Outcome([], "death", f"it answered with {str(said)[:_SHOWN]}")

    def has_spoken(self) -> bool:
        """Return whether something came without a question, or its process has ended."""
        if self._has_ended():
            return True
        self._socket.settimeout(0)
        try:
            return self._socket.recv(1) is not None
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _has_ended(self) -> bool:
        """Return whether its process has ended.

        What that started may still have its end of the socket open.

        It is not reaped here: `end` kills its process group first.
        """
        if self._process.returncode is not None:
            return True
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, how) is not None

    def exchange(self, message: list[Any] | None, timeout_s: float) -> dict[str, Any] | None:
        """Return the answer to `message`; None: it died, or is to be ended, as it said anything
        else.

        message: None for its first word, which it says unasked. Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        received = b""
        try:
            if message is not None:
                self._num_asked += 1
                self._socket.settimeout(timeout_s)
                self._socket.sendall(json.dumps([self._num_asked, *message]).encode() + b"\n")
            while b"\n" not in received:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                if len(received) > _LONGEST_ANSWER:
                    return None
                self._socket.settimeout(left)
                part = self._socket.recv(_PART)
                if not part:
                    return None
                received += part
        except ConnectionError:
            return None
        return _answer_of(received, self._num_asked)

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


def _answer_of(received: bytes, number: int) -> dict[str, Any] | None:
    """The one line, if it is an object with that number."""
    line, _, more = received.partition(b"\n")
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if more or not isinstance(said, dict) or said.pop("number", None) != number:
        return None
    return said


def _environment(named: Sequence[str]) -> dict[str, str]:
    """Return a worker's environment: our variables that hold no secret, and those that the user
    names.

    A worker computes with one OpenMP thread and sees no GPU.
    """
    kept = {k: v for k, v in os.environ.items() if k in named or _HANDED_ON.fullmatch(k)}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

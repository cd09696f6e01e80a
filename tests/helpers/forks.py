"""`megafork ARGUMENTS` in a fork of the process that tests, which has imported what it needs.

A run at TP 2 imports torch and megatron-core three times, in the launcher and in each rank, which
takes longer than the run of a tiny model. Here none of them imports anything: the launcher is a
fork of this process, and its ranks are forks of the launcher. Servers and verifiers are started as
ever, and some tests start all as a user does: `commands.executed_megafork`, and
`LiveRun(executed=True)`.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import psutil
import setproctitle

_FORK = multiprocessing.get_context("fork")
_ROOT = Path(__file__).parents[2]


class Fork:
    """What subprocess.Popen is of a program, this is of `megafork ARGUMENTS`.

    environment: all of it. shown: those of its variables that its command line, as `ps` and psutil
    see it, has behind its words: a fork's environment cannot be read from outside. stdout, stderr:
    files that have descriptors; None: those of this process. prepare: is called in the fork first.
    """

    def __init__(
        self,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        shown: tuple[str, ...],
        *,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        session: bool = False,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self.args = ["megafork", *arguments]
        files = [(1, stdout), (2, stderr)]
        descriptors = [(d, file.fileno()) for d, file in files if file is not None]
        self._process = _FORK.Process(
            target=_be_megafork,
            args=(self.args, environment, shown, descriptors, session, prepare),
        )
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def variable(process: psutil.Process, name: str) -> str | None:
    """Of a process's environment, forked or not; None: it has none. Raises psutil.Error."""
    for word in process.cmdline():
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return process.environ().get(name)


def _be_megafork(
    argv: list[str],
    environment: Mapping[str, str],
    shown: tuple[str, ...],
    descriptors: list[tuple[int, int]],
    session: bool,
    prepare: Callable[[], object],
) -> None:
    """What a start of the command finds, without pytest's streams, handlers and filters."""
    if session:
        os.setsid()
    gc.freeze()  # what earlier tests left is not this process's to collect
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, own in descriptors:
        os.dup2(own, descriptor)
    sys.stdout, sys.stderr = (open(d, "w", 1, closefd=False) for d in (1, 2))  # noqa: SIM115
    sys.argv = argv
    words = [f"{name}={environment[name]}" for name in shown if name in environment]
    setproctitle.setproctitle(" ".join(["python -m", *argv, *words]))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(_ROOT)
    logging.root.handlers.clear()
    _show_warnings_as_python_does()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # the threads of this process's OpenMP are not in the fork
    _fork_the_ranks(shown)
    from megafork.cli import main

    try:
        prepare()
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _fork_the_ranks(shown: tuple[str, ...]) -> None:
    """In this process torchelastic's agent forks what it would start."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from megafork.system.rendezvous import STORE

    def popen(
        args: tuple[str, ...],
        env: Mapping[str, str],
        stdout: IO[Any] | None,
        stderr: IO[Any] | None,
        start_new_session: bool,
    ) -> Fork:
        python, *module = args[:3]
        assert (python, module) == (sys.executable, ["-m", "megafork"])
        return Fork(
            args[3:],
            env,
            (*shown, "RANK", STORE),
            stdout=stdout,
            stderr=stderr,
            session=start_new_session,
        )

    subprocess_handler.Popen = popen


def _show_warnings_as_python_does() -> None:
    """pytest records them, and has filters of its own."""

    def show(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.resetwarnings()
    warnings.showwarning = show
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)

"""Starts the ranks that a layout needs when a command was started plainly."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from types import FrameType

import psutil

from megafork.config import ParallelConfig
from megafork.errors import UserError
from megafork.interruption import INTERRUPTED, SIGNALS

USER_ERROR = 2
"""Exit status after a UserError, which the rank has told."""
_LAUNCHER = "MEGAFORK_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch_ranks(parallel: ParallelConfig, arguments: list[str]) -> int:
    """Run `python -m megafork ARGUMENTS` on parallel.world_size ranks of this machine.

    Returns the exit status of the first rank that failed, 0 when none did. What the ranks print
    goes through, and so do SIGTERM and SIGUSR1 to them; they end with this process.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[_LAUNCHER] = str(os.getpid())
    for module in ("multiprocessing.api", "agent.server.api"):  # the ranks tell it themselves
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=parallel.world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=f"megafork-{os.getpid()}",
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # its grace of 30 s is too short for the others
    )
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        _signal_ranks(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        elastic_launch(config, sys.executable)("-m", "megafork", *arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if -first.exitcode in passed_on:
            print("stopped by a signal", file=sys.stderr)
            return INTERRUPTED
        if first.exitcode not in (USER_ERROR, INTERRUPTED):
            how = f"by signal {-first.exitcode}" if first.exitcode < 0 else f"{first.exitcode}"
            print(f"error: rank {rank} was the first to end, with status {how}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 1
    return 0


def _signal_ranks(number: int) -> None:
    found = False
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "megafork" in child.cmdline():
                child.send_signal(number)
                found = True
    if not found:
        sys.exit(INTERRUPTED)


def end_with_launcher() -> None:
    """A rank that `launch_ranks` started ends when its launcher is killed (Linux)."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # killed before the line above
        sys.exit(1)


def check_world(parallel: ParallelConfig) -> None:
    """Under torchrun: the world must be a multiple of tp * pp * cp. Raises UserError."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"torchrun started {world_size} ranks, no multiple of parallel.tp={parallel.tp} * "
            f"pp={parallel.pp} * cp={parallel.cp} = {parallel.model_parallel_size}"
        )

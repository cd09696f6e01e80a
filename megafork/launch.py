"""Starts the ranks that a layout needs when a command was started plainly."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from dataclasses import asdict, dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import psutil

from megafork import last_words
from megafork.config import ParallelConfig
from megafork.errors import UserError
from megafork.interruption import INTERRUPTED, SIGNALS

USER_ERROR = 2
"""Exit status after a UserError, which the rank has told."""
_LAUNCHER = "MEGAFORK_LAUNCHER_PID"
_MACHINES = "MEGAFORK_MACHINES"
ENDPOINT = "MEGAFORK_ENDPOINT"
"""host:port of the first machine's rendezvous, which is found when all machines are there"""
JOINED = "MEGAFORK_JOINED_OUTPUT"
"""Set for a rank whose errors belong into the file that has its output"""
_RENDEZVOUS_S = 60
"""The machines are known to be there: an address that does not answer by now is wrong."""
_PR_SET_PDEATHSIG = 1

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


@dataclass(frozen=True)
class Machines:
    """The machines that share a run, as megafork.nodes tells each of them."""

    count: int
    this: int
    ranks_each: int
    logs: str
    """Folder of the ranks' logs"""

    def environment(self) -> dict[str, str]:
        return {_MACHINES: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Self | None:
        told = os.environ.get(_MACHINES)
        return None if told is None else cls(**json.loads(told))

    def log_of(self, rank: int) -> str:
        return f"{self.logs}/rank-{rank}.log"


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch_ranks(parallel: ParallelConfig, arguments: list[str]) -> int:
    """Run `python -m megafork ARGUMENTS` on parallel.world_size ranks of this machine.

    Returns the exit status of the first rank that failed, 0 when none did. What the ranks print
    goes through, and so do SIGTERM and SIGUSR1 to them; they end with this process.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[_LAUNCHER] = str(os.getpid())
    for module in ("multiprocessing.api", "agent.server.api"):  # the ranks tell it themselves
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    machines = Machines.from_environment()
    config = LaunchConfig(
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # its grace of 30 s is too short for the others
        **(_here_alone(parallel) if machines is None else _one_of(machines)),
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
        rank, first = _first_failure(error)
        if -first.exitcode in passed_on:
            print("stopped by a signal", file=sys.stderr)
            return INTERRUPTED
        status = first.exitcode
        if status == -signal.SIGTERM and _words_of(first):
            status = USER_ERROR  # it had told, and was ended as another had ended before it
        if status not in (USER_ERROR, INTERRUPTED) and machines is None:
            how = f"by signal {-status}" if status < 0 else f"{status}"
            print(f"error: rank {rank} was the first to end, with status {how}", file=sys.stderr)
        if machines is not None:
            _leave_words_of(rank, status, _words_of(first), machines.log_of(rank))
        return status if status > 0 else 1
    return 0


def _here_alone(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": parallel.world_size,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "127.0.0.1:0",
        "run_id": f"megafork-{os.getpid()}",
    }


def _one_of(machines: Machines) -> dict[str, Any]:
    """A static rendezvous: a machine that is lost ends the run, nobody waits for another."""
    from megafork.rank_logs import RankLogs

    return {
        "min_nodes": machines.count,
        "max_nodes": machines.count,
        "nproc_per_node": machines.ranks_each,
        "rdzv_backend": "static",
        "rdzv_endpoint": os.environ[ENDPOINT],
        "rdzv_configs": {"rank": machines.this, "timeout": _RENDEZVOUS_S},
        "run_id": "megafork",
        "logs_specs": RankLogs(machines.log_of),
        "log_line_prefix_template": "[rank ${rank}] ",
    }


def _first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Of a rank that says why, or was killed; others have ended because of one."""
    told = {r: f for r, f in error.failures.items() if _words_of(f) or f.exitcode < 0}
    error.failures = told or error.failures
    return error.get_first_failure()


def _words_of(failure: ProcessFailure) -> str | None:
    message: Any = failure.message  # a str of torch's own where the rank left no words
    return message["message"] if isinstance(message, dict) else None


def _leave_words_of(rank: int, status: int, words: str | None, log: str) -> None:
    if status < 0:
        last_words.leave(f"rank {rank} was killed by signal {-status}", log)
    elif words is not None:
        last_words.leave(f"rank {rank} ended with status {status}: {words}", log)


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


def join_output() -> None:
    """A rank with a log of its own: what it says of errors goes there too."""
    if JOINED in os.environ:
        os.dup2(1, 2)


def check_world(parallel: ParallelConfig) -> None:
    """Under torchrun: the world must be a multiple of tp * pp * cp. Raises UserError."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"torchrun started {world_size} ranks, no multiple of parallel.tp={parallel.tp} * "
            f"pp={parallel.pp} * cp={parallel.cp} = {parallel.model_parallel_size}"
        )

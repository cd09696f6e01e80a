"""Starts the ranks that a layout needs when a command was started plainly."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import psutil

from megafork.config import ParallelConfig
from megafork.errors import UserError
from megafork.system import failure_file
from megafork.system.child_process import die_with_parent
from megafork.system.heap import told_of_a_kill
from megafork.system.lock import STALE_S, held
from megafork.system.printable import printable
from megafork.system.signals import INTERRUPTED, LEFT, SIGNALS, name_of, tell_first_ctrl_c

_LAUNCHER = "MEGAFORK_LAUNCHER_PID"
_MACHINES = "MEGAFORK_MACHINES"
ENDPOINT = "MEGAFORK_ENDPOINT"
"""host:port of the first machine's rendezvous, which is found when all machines are there"""
JOINED = "MEGAFORK_JOINED_OUTPUT"
"""Set for a rank whose errors belong into the file that has its output"""
_RENDEZVOUS_S = 60 + STALE_S
"""The machines are known to be there: an address that does not answer by now is wrong. The first
one may have to find out whether the run's lock is stale."""

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


@dataclass(frozen=True)
class Machines:
    """The machines that share a run, as megafork.cluster tells each of them."""

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


def starts_on_this_machine() -> bool:
    """Return whether this process is going to start all ranks of a run, on this machine."""
    return not under_torchrun() and Machines.from_environment() is None


def tells() -> bool:
    """Return whether this process is the one that tells what every rank finds.

    That is the process that starts the ranks, or rank 0 of a world that somebody else started.
    """
    if not under_torchrun():
        return True
    return _LAUNCHER not in os.environ and os.environ["RANK"] == "0"


def launch_ranks(parallel: ParallelConfig, arguments: list[str], run_dir: str = "") -> int:
    """Run `python -m megafork ARGUMENTS` on parallel.world_size ranks of this machine.

    run_dir: a training run's folder, whose lock is held as long as its ranks live.

    Returns the exit status of the rank that failed first by itself, having told why; 0 when none
    did, 75 after a signal, and 130 after a second Ctrl-C. What the ranks print goes through, or
    under megafork.cluster into a log for each. SIGTERM and SIGUSR1 are passed on to them, the
    first Ctrl-C as a SIGTERM; a second one kills them. They end with this process.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[_LAUNCHER] = str(os.getpid())
    for module in ("multiprocessing.api", "agent.server.api"):  # the ranks tell it themselves
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    machines = Machines.from_environment()
    received: list[int] = []
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:  # Python answers it with a traceback while it starts
            is_first = received.count(number) == 1
            number = signal.SIGTERM if is_first else signal.SIGKILL
            if is_first:
                tell_first_ctrl_c()
        passed_on.append(number)
        _signal_ranks(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    folder = tempfile.TemporaryDirectory(prefix="megafork-ranks-")  # of this user alone
    config = LaunchConfig(
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",  # its grace of 30 s is too short for the others
        **_of_ranks(parallel, machines, folder.name),
    )
    with folder, _hold(run_dir, machines), _ends_noted() as times:
        try:
            elastic_launch(config, sys.executable)("-m", "megafork", *arguments)
            return 0
        except ChildFailedError as error:
            first = first_end(error.failures, times)
    if signal.SIGKILL in passed_on:
        print("left at once after a second Ctrl-C", file=sys.stderr)
        return LEFT
    if -first.status in passed_on:
        print(f"stopped by {name_of(received[0])}", file=sys.stderr)
        return INTERRUPTED
    if machines is not None:
        _leave_words_of(first, machines.log_of(first.rank))
    elif first.words is not None:
        print(error_of(first.rank, first.words.message), file=sys.stderr)
    elif first.status != INTERRUPTED:
        how = _killed(first.status) if first.status < 0 else f"status {first.status}"
        print(f"error: rank {first.rank} was the first to end, with {how}", file=sys.stderr)
    return first.status if first.status > 0 else 1


@contextlib.contextmanager
def _ends_noted() -> Iterator[dict[int, float]]:
    """Yield the times at which children end, by their pids, filled in as they do."""
    times: dict[int, float] = {}

    def note(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.status() == psutil.STATUS_ZOMBIE:
                    times.setdefault(child.pid, time.time())

    before = signal.signal(signal.SIGCHLD, note)
    try:
        yield times
    finally:
        signal.signal(signal.SIGCHLD, before)


@dataclass(frozen=True)
class End:
    """The end of a rank that did not end well."""

    rank: int
    status: int
    words: failure_file.Words | None
    time: float


def first_end(failures: dict[int, ProcessFailure], times: dict[int, float]) -> End:
    """Return the earliest end by a rank's own failure; without one, a consequence of others.

    times: when ranks have ended, by their pids. A rank that torchrun's agent reaped first is not in
    it: of that one only the second is known in which the agent saw it. When one rank has failed,
    the agent ends the others by SIGTERM, and by SIGKILL where they hang: such an end is no cause.
    """
    seen = {r: times.get(f.pid, f.timestamp + 1.0) for r, f in failures.items()}
    first_seen = min(seen.values())
    ends = []
    for rank, failure in failures.items():
        words = failure_file.read(failure.error_file)
        if words is None:
            ends.append(End(rank, failure.exitcode, None, seen[rank]))
        else:
            ends.append(End(rank, words.status, words, words.time))

    def precedence(end: End) -> tuple[int, float]:
        by_agent = end.status in (-signal.SIGTERM, -signal.SIGKILL) and end.time > first_seen
        if end.words is None and by_agent:
            return 3, end.time
        if end.words is not None and not end.words.own:
            return 2, end.time
        return (1 if end.status == INTERRUPTED else 0), end.time

    return min(ends, key=precedence)


def error_of(rank: int, message: str) -> str:
    """Return the line that tells a rank's failure."""
    where = "" if rank == 0 else f" (rank {rank})"
    return f"error{where}: {printable(message)}"


def _hold(run_dir: str, machines: Machines | None) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of the run's folder; the first machine does it for all."""
    if not run_dir or (machines is not None and machines.this != 0):
        return contextlib.nullcontext()
    return held(Path(run_dir), "run.dir")


def _of_ranks(parallel: ParallelConfig, machines: Machines | None, folder: str) -> dict[str, Any]:
    """Return LaunchConfig's arguments for the ranks of this machine.

    The number of machines is fixed: a lost one ends the run, and nobody waits for another.
    """
    from megafork.cluster.rank_logs import RankLogs
    from megafork.system.rendezvous import (
        STORE,
        launch_options,
        on_one_machine,
        on_several_machines,
    )

    variables: dict[str, str] = {}
    count, log_of = 1, None
    if machines is not None:
        count, log_of = machines.count, machines.log_of
        variables[JOINED] = "1"
    if machines is None or count == 1:
        variables[STORE] = f"{folder}/store"
        meeting = on_one_machine(variables[STORE])
    else:
        endpoint, this = os.environ[ENDPOINT], machines.this
        meeting = on_several_machines(endpoint, this=this, count=count, timeout_s=_RENDEZVOUS_S)
    return launch_options(meeting) | {
        "min_nodes": count,
        "max_nodes": count,
        "nproc_per_node": parallel.world_size if machines is None else machines.ranks_each,
        "logs_specs": RankLogs(folder, log_of, variables),
        "log_line_prefix_template": None if machines is None else "[rank ${rank}] ",
    }


def _leave_words_of(end: End, log: str) -> None:
    if end.words is not None:
        told, own = f"ended with status {end.status}: {end.words.line}", end.words.own
    elif end.status < 0:
        told, own = f"was killed by signal {-end.status}", True
    else:
        return
    failure_file.leave(f"rank {end.rank} {told}", status=max(end.status, 1), own=own, log=log)


def _killed(status: int) -> str:
    told = f", {told_of_a_kill()}" if status == -signal.SIGKILL else ""
    return f"signal {-status}{told}"


def _signal_ranks(number: int) -> None:
    found = False
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "megafork" in child.cmdline():
                child.send_signal(number)
                found = True
    if not found:
        print(f"stopped by {name_of(number)}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def end_with_launcher() -> None:
    """Have a rank that `launch_ranks` started end when its launcher is killed (Linux)."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None:
        die_with_parent(int(launcher))


def join_output() -> None:
    """Send a rank's stderr into its log too, where it has one of its own."""
    if JOINED in os.environ:
        os.dup2(1, 2)


def check_world(parallel: ParallelConfig) -> None:
    """Raise UserError unless torchrun's world is a multiple of tp * pp * cp."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % parallel.model_parallel_size:
        raise UserError(
            f"torchrun started {world_size} ranks, no multiple of parallel.tp={parallel.tp} * "
            f"pp={parallel.pp} * cp={parallel.cp} = {parallel.model_parallel_size}"
        )

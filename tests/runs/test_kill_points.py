"""Each kind of a run's processes, killed or stopped in each phase: nothing is lost or left over.

One run is ended and resumed again and again, and in the end it is what an uninterrupted one would
be, bit for bit, of the same journal.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megafork.metrics.log import read_rows
from megafork.parallel.progress import FileBoard
from megafork.system.rendezvous import STORE
from megafork.system.signals import INTERRUPTED
from tests.helpers.commands import left_over, tiny_run
from tests.helpers.forks import variable
from tests.helpers.live_runs import LiveRun
from tests.helpers.replays import (
    assert_kept,
    comparable,
    journalled,
    replayed_in_one_go,
    resume,
)

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(5400)]

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
SETTINGS = (
    "training.steps=1000",
    "eval.prompts=8",
    "sync.check_every=1",
    "sync.check_prompts=2",
    "rollout.max_policy_lag=1",
    "parallel.tp=2",
    "checkpoint.every=2",
    "rollout.max_restarts=3",
    "reward.timeout_s=2",
    "run.silence_s=10",
)


@dataclass(frozen=True)
class Point:
    victim: str
    phase: str
    """of rank 0 at that moment; see `_wait_for`"""
    number: signal.Signals
    ends: bool
    """whether the run ends of it; else it goes on"""

    def __str__(self) -> str:
        return f"{self.number.name} of the {self.victim} in {self.phase}"


POINTS = [
    Point("launcher", "start", KILL, ends=True),
    Point("launcher", "generate", KILL, ends=True),
    Point("launcher", "save", KILL, ends=True),
    Point("launcher", "update", STOP, ends=False),
    Point("rank 0", "start", KILL, ends=True),
    Point("rank 0", "generate", KILL, ends=True),
    Point("rank 0", "update", KILL, ends=True),
    Point("rank 0", "sync", KILL, ends=True),
    Point("rank 0", "save", KILL, ends=True),
    Point("rank 0", "generate", STOP, ends=True),
    Point("rank 1", "score", KILL, ends=True),
    Point("rank 1", "sync", KILL, ends=True),
    Point("rank 1", "update", STOP, ends=True),
    Point("writer", "save", KILL, ends=True),
    Point("writer", "save", STOP, ends=True),
    Point("controller", "start", KILL, ends=True),
    Point("controller", "generate", KILL, ends=True),
    Point("controller", "update", KILL, ends=True),
    Point("controller", "sync", KILL, ends=True),
    Point("controller", "save", KILL, ends=True),
    Point("controller", "generate", STOP, ends=True),
    Point("agent", "generate", KILL, ends=True),
    Point("agent", "generate", STOP, ends=False),
    Point("server", "generate", KILL, ends=False),
    Point("server", "sync", KILL, ends=False),
    Point("server", "update", KILL, ends=False),
    Point("server", "generate", STOP, ends=False),
    Point("supervisor", "generate", KILL, ends=False),
    Point("supervisor", "update", STOP, ends=False),
    Point("verifier", "generate", KILL, ends=False),
    Point("verifier", "generate", STOP, ends=False),
]
PROGRAMS = {
    "controller": "from megafork.controller.process",
    "agent": "from megafork.controller.agent",
    "supervisor": "megafork.rollout.supervisor",
    "server": "tests.helpers.tiny_engine",
    "verifier": "from megafork.verifiers.worker",
}
RANKS_END_WITHIN_S = 120.0
"""Of parallel.timeout_minutes, and 30 s for one that is stopped and hears no SIGTERM"""


def test_each_kind_of_process_in_each_phase(tmp_path):
    run_dir = tmp_path / "run"
    arguments = tiny_run(run_dir, *SETTINGS)
    for point in POINTS:
        before, started = journalled(run_dir), time.monotonic()
        minutes = 0.4 if point.ends else 3  # ranks wait in a push while a server is given up
        told = [*arguments, f"parallel.timeout_minutes={minutes}"]
        with _private_tmpdir() as folder, LiveRun(run_dir, *told, TMPDIR=str(folder)) as run:
            victim = _wait_for(point, run, run_dir)
            victim.send_signal(point.number)
            how = _ends(run, point, victim) if point.ends else _goes_on(run, point, victim)
            assert left_over(run_dir, seconds=30) == [], point
            left = [path.name for path in folder.iterdir()]
            if point.victim == "launcher" and point.number == KILL:  # SECURITY.md
                left = [name for name in left if not name.startswith("megafork-ranks-")]
            assert left == [], point
        assert_kept(run_dir, before, str(point))
        print(
            f"{point}: {how}; {len(journalled(run_dir))} steps in the journal, "
            f"{len(read_rows(run_dir / 'metrics.jsonl'))} in the metrics, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        if (run_dir / "config.toml").exists():  # it was not killed before it began
            arguments = ["train", "--resume", str(run_dir)]
    last = max(int(name[5:11]) for name in journalled(run_dir))
    resume(run_dir, f"training.steps={last}")
    rows, weights = comparable(run_dir)
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    other_rows, other_weights = replayed_in_one_go(run_dir, tmp_path / "replayed")
    assert rows == other_rows
    assert weights == other_weights


@contextlib.contextmanager
def _private_tmpdir() -> Iterator[Path]:
    """With a short name: sockets are made in it."""
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ends(run: LiveRun, point: Point, victim: psutil.Process) -> str:
    """It has told why, in one line and without a traceback."""
    status = run.end(RANKS_END_WITHIN_S)
    if point.victim == "launcher":
        return "ended"
    assert status not in (0, INTERRUPTED), point
    errors = [line for line in run.told.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in run.told, run.told
    if point.victim.startswith("rank") and point.number == KILL:
        rank = point.victim[-1]
        told = rf"error: rank {rank} was the first to end, with signal 9, as the kernel does where "
        told += r"memory runs out: the largest process had \d+\.\d GiB of this machine's \d+\.\d"
        assert re.match(told, errors[0]), errors
    return errors[0]


def _goes_on(run: LiveRun, point: Point, victim: psutil.Process) -> str:
    """For two steps more, and ends when it is asked to."""
    steps = len(run.rows)
    run.wait_for(lambda: len(run.rows) >= steps + 2)
    with contextlib.suppress(psutil.Error):
        victim.resume()
    run.signal(signal.SIGTERM)
    assert run.end(60) == INTERRUPTED, run.told
    assert "Traceback" not in run.told and "\nerror" not in run.told, run.told
    return "went on"


def _wait_for(point: Point, run: LiveRun, run_dir: Path) -> psutil.Process:
    """The process, at the moment when rank 0 is in the phase, of a step that this start has made.

    start: as soon as there is such a process. save: while a process writes a checkpoint.
    """
    last = max((row["step"] for row in read_rows(run_dir / "metrics.jsonl")), default=0)
    found: list[psutil.Process] = []

    def has_come() -> bool:
        found[:] = _victims(point.victim, run)
        if not found:
            return False
        if point.phase == "start":
            return True
        if point.phase == "save":
            return bool(_victims("writer", run)) and any(
                path.stat().st_size for path in run_dir.glob("checkpoints/*.partial/*.distcp")
            )
        return _is_in(point.phase, run, last)

    run.wait_for(has_come)
    return found[0]


def _victims(kind: str, run: LiveRun) -> list[psutil.Process]:
    launcher = psutil.Process(run.process.pid)
    if kind == "launcher":
        return [launcher]
    with contextlib.suppress(psutil.Error):
        if kind in PROGRAMS:
            children = launcher.children(recursive=True)
            return [c for c in children if any(PROGRAMS[kind] in word for word in c.cmdline()[:4])]
        ranks = [rank for rank in launcher.children() if variable(rank, "RANK") is not None]
        if kind == "writer":  # a fork of its rank
            children = [child for rank in ranks for child in rank.children()]
            return [child for child in children if child.cmdline() in [r.cmdline() for r in ranks]]
        return [rank for rank in ranks if kind == f"rank {variable(rank, 'RANK')}"]
    return []


def _is_in(phase: str, run: LiveRun, after_step: int) -> bool:
    """What rank 0 has written down of its progress, read from outside."""
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        [rank] = _victims("rank 0", run)
        board = FileBoard(Path(variable(rank, STORE) or "").parent)
        found = re.fullmatch(r"\S+ (\w+) of step (\d+)", board.get("at/0").decode())
        return found is not None and found[1] == phase and int(found[2]) > after_step
    return False

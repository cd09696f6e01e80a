"""A run that is killed goes on: nothing in the journal is generated again, nothing else differs."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time

import psutil
import pytest
from torch.distributed import TCPStore

from megafork.logging.metrics import read_rows
from tests.helpers.commands import left_over, lines, small_run
from tests.helpers.replays import (
    assert_kept,
    comparable,
    journalled,
    kill_when,
    replayed_in_one_go,
    resume,
    start,
)

pytestmark = pytest.mark.slow

SETTINGS = (
    "training.steps=3",
    "checkpoint.every=2",
    "parallel.tp=1",
    "eval.prompts=8",
    "sync.check_prompts=2",
    "forking.rho_end=0.1",
    "forking.rho_steps=3",
)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """Killed while it writes a checkpoint and generates the next step."""
    run_dir = tmp_path / "run"
    process = start(small_run(run_dir, *SETTINGS), run_dir)
    kill_when(process, run_dir / "checkpoints" / "step_000002.partial", 0.0)
    assert left_over(run_dir, seconds=10) == []
    before = journalled(run_dir)
    resume(run_dir)
    assert_kept(run_dir, before)
    rows, weights = comparable(run_dir)
    assert [(row["step"], row["forking/rho"]) for row in rows] == [(1, 0.2), (2, 0.15), (3, 0.1)]
    assert [row["step"] for row in lines(run_dir / "eval.jsonl")] == [0, 3]
    other_rows, other_weights = replayed_in_one_go(run_dir, tmp_path / "replayed")
    assert rows == other_rows
    assert weights == other_weights
    tokens, other_tokens = (
        (folder / "forking_tokens.jsonl").read_bytes()
        for folder in (run_dir, tmp_path / "replayed")
    )
    assert tokens == other_tokens != b""


def wait_until(process, found):
    deadline = time.monotonic() + 120
    while not found():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)


class Board:
    """What the ranks write down of their whereabouts, read from outside."""

    def __init__(self, process):
        self.process = process
        self.store = self.key = None

    def says(self, phase, after_step):
        """Whether rank 0 is in this phase of a step later than `after_step`."""
        with contextlib.suppress(psutil.Error, RuntimeError, StopIteration):
            if self.store is None:
                ranks = psutil.Process(self.process.pid).children()
                environ = next(e for r in ranks if "MASTER_PORT" in (e := r.environ()))
                host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
                self.store = TCPStore(host, port, is_master=False, wait_for_workers=False)
            if self.key is None:
                self.key = next(k for k in self.store.list_keys() if k.endswith("whereabouts/at/0"))
            found = re.fullmatch(r"\S+ (\w+) of step (\d+)", self.store.get(self.key).decode())
            return found is not None and found[1] == phase and int(found[2]) > after_step
        return False


def wait_for_moment(kind, process, run_dir, moments):
    """Until the run, just started, is in the middle of what `kind` says, of a step that is new."""
    before = {path.name for path in run_dir.glob("checkpoints/*")}
    last = max((row["step"] for row in read_rows(run_dir / "metrics.jsonl")), default=0)
    if kind == "start":
        time.sleep(moments.uniform(0, 12))
    elif kind == "save":
        partial = run_dir / "checkpoints"
        wait_until(process, lambda: {p.name for p in partial.glob("*.partial")} - before)
        time.sleep(moments.uniform(0, 0.5))
    else:
        board = Board(process)
        wait_until(process, lambda: board.says(kind, last))
        time.sleep(moments.uniform(0, 0.1))
        if not board.says(kind, last):
            print(f"({kind} was over already)")


KINDS = ("generate", "update", "sync", "save", "start", "score")


@pytest.mark.skipif("MEGAFORK_KILLS" not in os.environ, reason="set MEGAFORK_KILLS to a number")
@pytest.mark.timeout(3000)
def test_random_moments(tmp_path):
    """MEGAFORK_KILLS=20 takes some minutes; MEGAFORK_SEED repeats a sequence of moments."""
    seed = int(os.environ.get("MEGAFORK_SEED", random.randrange(10**6)))
    print(f"MEGAFORK_SEED={seed}")
    moments = random.Random(seed)
    run_dir = tmp_path / "run"
    arguments = small_run(run_dir, "training.steps=1000", *SETTINGS[1:], "parallel.tp=2")
    for kill in range(int(os.environ["MEGAFORK_KILLS"])):
        before = journalled(run_dir)
        process = start(arguments, run_dir)
        kind = KINDS[kill % len(KINDS)]
        wait_for_moment(kind, process, run_dir, moments)
        assert process.poll() is None, f"kill {kill}: {process.stdout.read()}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert left_over(run_dir, seconds=10) == []
        assert_kept(run_dir, before, f"kill {kill}")
        rows, partial = read_rows(run_dir / "metrics.jsonl"), list(run_dir.glob("*/*.partial"))
        print(
            f"kill {kill}, in {kind}: {len(journalled(run_dir))} steps in the journal, {len(rows)} "
            f"in the metrics, half-written: {[path.name for path in partial]}",
            flush=True,
        )
        arguments = ["train", "--resume", str(run_dir)]
    last = max(int(name[5:11]) for name in journalled(run_dir))
    resume(run_dir, f"training.steps={last}")
    rows, weights = comparable(run_dir)
    assert [row["step"] for row in rows] == list(range(1, last + 1))
    other_rows, other_weights = replayed_in_one_go(run_dir, tmp_path / "replayed")
    assert rows == other_rows
    assert weights == other_weights

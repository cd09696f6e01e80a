"""Ctrl-C, and SIGTERM and SIGUSR1 where a run waits: at its start, for a verifier, for a job of
another thread.

test_resume.py has what the two do to a run that trains.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from megafork.errors import Interrupted
from megafork.system.signals import INTERRUPTED, Interruption
from tests.helpers.commands import left_over, tiny_run
from tests.helpers.live_runs import LiveRun, middle_of
from tests.helpers.replays import assert_kept, journalled, resume


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    run_dir = tmp_path / "run"
    with LiveRun(run_dir, *tiny_run(run_dir, "parallel.tp=2")) as run:
        run.wait_for((run_dir / "config.toml").exists)
        run.signal(signal.SIGTERM)
        assert run.end(60) == INTERRUPTED == 75
    assert left_over(run_dir, seconds=20) == []
    assert list((run_dir / "checkpoints").iterdir()) == []
    last = run.told.splitlines()[-1]
    assert re.fullmatch(r"stopped by SIGTERM( while it started)?", last)


@pytest.mark.slow
def test_a_hung_verifier_does_not_hold_up_a_signal(tmp_path):
    run_dir, hung = tmp_path / "run", tmp_path / "hung"
    hung.mkdir()
    verifier = "reward.verifier=tests.helpers.verifiers:hangs_in_the_folder"
    sees = 'reward.environment=["HUNG"]'
    settings = ["parallel.tp=1", verifier, sees, "reward.timeout_s=600", "eval.prompts=1"]
    with LiveRun(run_dir, *tiny_run(run_dir, *settings), HUNG=str(hung)) as run:
        run.wait_for(lambda: list(hung.iterdir()))
        run.signal(signal.SIGTERM)
        assert run.end(30) == INTERRUPTED
    assert left_over(run_dir) == []
    assert "stopped by SIGTERM after step 0" in run.told


def press_ctrl_c(run):
    """A terminal sends SIGINT to the process group in its foreground."""
    os.killpg(run.process.pid, signal.SIGINT)


def controller_of(run):
    [controller] = [
        child
        for child in psutil.Process(run.process.pid).children(recursive=True)
        if any("from megafork.controller.process" in word for word in child.cmdline())
    ]
    return controller


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_a_second_one_leaves_at_once(tmp_path, tp):
    run_dir = tmp_path / "run"
    settings = (f"parallel.tp={tp}", "training.steps=3", "checkpoint.every=0")
    with middle_of(2, run_dir, *tiny_run(run_dir, *settings)) as (run, _):
        press_ctrl_c(run)
        assert run.end(60) == INTERRUPTED
    assert left_over(run_dir) == []
    go_on = f"go on with megafork train --resume {run_dir}"
    assert run.told.count("Ctrl-C: the run is ending; a second Ctrl-C leaves at once\n") == 1
    name = "Ctrl-C" if tp == 1 else "SIGTERM"  # which the launcher makes of it
    assert run.told.endswith(f"stopped by {name} after step 1, which is saved: {go_on}\n")
    before = journalled(run_dir)
    with middle_of(3, run_dir, "train", "--resume", run_dir) as (run, _):
        (controller := controller_of(run)).suspend()  # nothing is saved without it
        press_ctrl_c(run)
        run.wait_for(lambda: "a second Ctrl-C leaves at once" in run.told)
        press_ctrl_c(run)
        assert run.end(20) == 130
        controller.resume()
    assert left_over(run_dir, seconds=20) == []
    assert run.told.splitlines()[-1] == "left at once after a second Ctrl-C"
    assert "Traceback" not in run.told
    assert_kept(run_dir, before)
    resume(run_dir)
    assert [row["step"] for row in run.rows] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_ctrl_c_at_any_moment_of_the_start(tmp_path, tp):
    """From the imports on: one line, nothing left, and the next start finds its way."""
    run_dir, ends = tmp_path / "run", set()
    arguments = tiny_run(run_dir, f"parallel.tp={tp}", "training.steps=100")
    for tenths in (0, 3, 8, 14, 22, 32, 45):
        with LiveRun(run_dir, *arguments, executed=True) as run:
            maps = Path(f"/proc/{run.process.pid}/maps")
            run.wait_for(lambda maps=maps: "pydantic_core" in maps.read_text())  # Python is up
            time.sleep(tenths / 10)
            press_ctrl_c(run)
            ends.add(run.end(60))
        assert left_over(run_dir, seconds=20) == [], tenths
        last = run.told.splitlines()[-1]
        assert re.match(r"stopped by (Ctrl-C|SIGTERM)( while it started| after step \d|$)", last), (
            run.told
        )
        assert "Traceback" not in run.told and "Aborted" not in run.told, run.told
        if (run_dir / "config.toml").exists():
            arguments = ["train", "--resume", str(run_dir)]
    assert ends <= {INTERRUPTED, -signal.SIGINT}


def signal_soon(number, seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def test_waiting_is_given_up_and_cleaned_up_after():
    cleaned = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)

    async def at_once():
        await asyncio.sleep(0)
        return 1

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with Interruption() as interruption:
        interruption.defer()
        assert interruption.run(at_once()) == 1
        signal_soon(signal.SIGUSR1, 0.2)
        started = time.monotonic()
        with pytest.raises(Interrupted, match="SIGUSR1"):
            interruption.run(work())
        assert time.monotonic() - started < 30
        assert cleaned == [True]
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received == "SIGUSR1"
        for late in (work(), at_once()):  # what has ended is not used either
            with pytest.raises(Interrupted, match="SIGUSR1"):
                interruption.run(late)
    assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    for number, handler in before.items():
        signal.signal(number, handler)
    with (
        pytest.raises(SystemExit, match="75"),
        Interruption(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    for number, handler in before.items():
        signal.signal(number, handler)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before

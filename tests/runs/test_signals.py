"""SIGTERM and SIGUSR1 where a run waits: at its start, for a verifier, for a job of another thread.

test_resume.py has what they do to a run that trains.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time

import pytest

from megafork.errors import Interrupted
from megafork.system.signals import INTERRUPTED, Interruption
from tests.helpers.commands import left_over, tiny_run
from tests.helpers.live_runs import LiveRun


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    run_dir = tmp_path / "run"
    with LiveRun(run_dir, *tiny_run(run_dir, "parallel.tp=2")) as run:
        run.wait_for((run_dir / "config.toml").exists)
        run.signal(signal.SIGTERM)
        assert run.end(60) == INTERRUPTED == 75
    assert left_over(run_dir, seconds=20) == []
    assert list((run_dir / "checkpoints").iterdir()) == []
    last = run.told.splitlines()[-1]
    assert re.fullmatch(r"stopped by (a signal|SIGTERM while it started)", last)


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

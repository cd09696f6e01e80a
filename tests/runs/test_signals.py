"""SIGTERM and SIGUSR1: the run saves, ends with status 75, and goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megafork.errors import Interrupted
from megafork.interruption import INTERRUPTED, Interruption
from megafork.rollout.background import BackgroundLoop
from tests.helpers.commands import ROOT, environment, left_over, lines, small_run
from tests.helpers.pages import read_page
from tests.helpers.replays import comparable, journalled, replayed_in_one_go, resume

STEPS = 6  # more than a loaded machine gets through before the signal is sent
SETTINGS = (
    f"training.steps={STEPS}",
    "checkpoint.every=0",
    "eval.prompts=8",
    "sync.check_prompts=2",
)


def start(run_dir, *overrides):
    with (run_dir.parent / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "megafork", *small_run(run_dir, *SETTINGS, *overrides)],
            cwd=ROOT,
            env=environment(run_dir),
            stderr=stderr,
            start_new_session=True,
        )


def wait_for(process, path, whole_lines=0):
    deadline = time.monotonic() + 150
    while not path.exists() or path.read_bytes().count(b"\n") < whole_lines:
        assert process.poll() is None, (path.parent.parent.parent / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_step(told):
    """1 as a rule: on a loaded machine the generation may be over before the signal is sent."""
    pattern = r"stopped by (SIGTERM|SIGUSR1|a signal) after step (\d), which is saved"
    said = re.search(pattern, told)
    assert said is not None, told
    return int(said[2])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_signal_saves_and_the_run_goes_on(tmp_path):
    """While it generates its second step, beside the first one's training."""
    run_dir = tmp_path / "run"
    process = start(run_dir, "parallel.tp=2", "rollout.max_policy_lag=1")
    wait_for(process, run_dir / "rollouts" / "step_000002.jsonl", 1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)  # the second says nothing new (Python may handle it first)
    assert process.wait(60) == INTERRUPTED == 75
    assert left_over(run_dir) == []
    told = (tmp_path / "stderr").read_text()
    saved = last_step(told)
    assert f"megafork train --resume {run_dir}" in told
    assert "Traceback" not in told and "error" not in told
    assert (run_dir / "checkpoints" / f"step_{saved:06d}" / "manifest.json").exists()
    done = list(range(1, saved + 1))
    assert [row["step"] for row in lines(run_dir / "metrics.jsonl")] == done
    state = read_page(run_dir / "report.html").by_id("state").text
    assert state.startswith(f"not finished: {saved} of {STEPS} steps")
    before = journalled(run_dir)
    resume(run_dir)
    for name, content in before.items():
        assert (run_dir / "rollouts" / name).read_bytes().startswith(content)
    assert [row["step"] for row in lines(run_dir / "eval.jsonl")] == [0, STEPS]
    rows, weights = comparable(run_dir)
    other_rows, other_weights = replayed_in_one_go(run_dir, tmp_path / "replayed")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == other_rows
    assert weights == other_weights


@pytest.mark.slow
def test_a_signal_to_every_process_at_once(tmp_path):
    """As Slurm does: the server and its supervisor get it too, in the middle of a generation."""
    run_dir = tmp_path / "run"
    process = start(run_dir, "parallel.tp=2")
    wait_for(process, run_dir / "rollouts" / "step_000002.jsonl", 1)
    for member in [process, *psutil.Process(process.pid).children(recursive=True)]:
        os.kill(member.pid, signal.SIGUSR1)
    assert process.wait(60) == INTERRUPTED
    assert left_over(run_dir) == []
    told = (tmp_path / "stderr").read_text()
    assert last_step(told) >= 1
    assert "Traceback" not in told and "error" not in told


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, "parallel.tp=2")
    wait_for(process, run_dir / "config.toml")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == INTERRUPTED
    assert left_over(run_dir, seconds=20) == []
    assert list((run_dir / "checkpoints").iterdir()) == []
    told = (tmp_path / "stderr").read_text()
    assert re.fullmatch(r"stopped by (a signal|SIGTERM while it started)", told.splitlines()[-1])


@pytest.mark.slow
def test_a_hung_verifier_does_not_hold_up_a_signal(tmp_path):
    run_dir, hung = tmp_path / "run", tmp_path / "hung"
    hung.mkdir()
    verifier = "reward.verifier=tests.helpers.verifiers:hangs_in_the_folder"
    settings = ["parallel.tp=1", verifier, "reward.timeout_s=600", "eval.prompts=1"]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "megafork", *small_run(run_dir, *settings)],
            cwd=ROOT,
            env=environment(run_dir) | {"HUNG": str(hung)},
            stderr=stderr,
        )
    deadline = time.monotonic() + 150
    while not list(hung.iterdir()):
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == INTERRUPTED
    assert left_over(run_dir) == []
    assert "stopped by SIGTERM after step 0" in (tmp_path / "stderr").read_text()


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
        return 1

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with Interruption() as interruption, BackgroundLoop() as background:
        interruption.defer()
        assert interruption.wait(background.submit(at_once())) == 1
        signal_soon(signal.SIGUSR1, 0.2)
        started = time.monotonic()
        with pytest.raises(Interrupted, match="SIGUSR1"):
            interruption.wait(background.submit(work()))
        assert time.monotonic() - started < 30
        assert cleaned == [True]
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received == "SIGUSR1"
        for late in (work(), at_once()):  # what has ended is not used either
            with pytest.raises(Interrupted, match="SIGUSR1"):
                interruption.wait(background.submit(late))
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

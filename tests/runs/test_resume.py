"""A run that is ended goes on: nothing in the journal is generated again, nothing else differs."""

from __future__ import annotations

import re
import signal

import pytest

from megafork.rollout.journal import Journal
from megafork.system.signals import INTERRUPTED
from tests.helpers.commands import (
    QUICKSTART,
    left_over,
    lines,
    megafork,
    processes_of,
    small_run,
    tiny_engine,
    tiny_run,
)
from tests.helpers.live_runs import LiveRun, middle_of
from tests.helpers.pages import read_page
from tests.helpers.replays import (
    assert_kept,
    comparable,
    journalled,
    replayed_in_one_go,
    resume,
)

pytestmark = pytest.mark.slow

STEPS = 7
SETTINGS = (
    f"training.steps={STEPS}",
    "eval.prompts=8",
    "sync.check_every=1",
    "sync.check_prompts=2",
    "rollout.max_policy_lag=1",
    "forking.rho_end=0.1",
    "forking.rho_steps=3",
)
RHOS = [0.2, 0.15, *[0.1] * (STEPS - 2)]


def assert_as_if_nothing_had_been(run_dir, folder):
    """What the run wrote is, bit for bit, that of an uninterrupted run of the same journal."""
    rows, weights = comparable(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["forking/rho"] for row in rows] == RHOS
    assert [row["step"] for row in lines(run_dir / "eval.jsonl")] == [0, STEPS]
    python = f"rollout.python={tiny_engine(run_dir.parent)}"  # nothing is generated
    other_rows, other_weights = replayed_in_one_go(run_dir, folder, python)
    assert rows == other_rows
    assert weights == other_weights
    tokens, other_tokens = (
        (path / "forking_tokens.jsonl").read_bytes() for path in (run_dir, folder)
    )
    assert tokens == other_tokens != b""


def test_vllm_a_killed_run_goes_on_and_its_server_is_replaced(tmp_path):
    """Killed while it writes a checkpoint and generates the next step."""
    run_dir = tmp_path / "run"
    settings = (*SETTINGS, "parallel.tp=1", "checkpoint.every=2")
    with LiveRun(run_dir, *small_run(run_dir, *settings), executed=True) as run:
        # Half-written, or just whole.
        run.wait_for(lambda: list(run_dir.glob("checkpoints/step_000002*")))
        # launcher, rank, supervisor, and vLLM's server and engine
        assert len(processes_of(run_dir)) >= 5
        run.kill()
    assert left_over(run_dir, seconds=10) == []
    before = journalled(run_dir)
    with LiveRun(run_dir, "train", "--resume", run_dir, executed=True) as run:
        run.wait_for(run.journal(5).exists)
        half = run.journal(5).read_bytes()
        run.kill_server()
        assert run.end() == 0, run.told
    assert left_over(run_dir) == []
    assert_kept(run_dir, before)
    assert run.told.count("the rollout server died and is replaced") == 1
    assert "does not answer" in run.told  # the cause
    assert "supervisor" not in (run_dir / "vllm.log").read_text().split("\n")[0]
    assert (run_dir / "vllm.1.log").exists()
    assert run.journal(5).read_bytes().startswith(half)
    for step in range(1, STEPS + 1):
        prompts = [group.prompt_index for group in Journal.read(run.journal(step))]
        assert len(set(prompts)) == len(prompts)
    assert [row["policy_version"] for row in run.rows] == list(range(2, STEPS + 2))
    fresh = [row["mismatch/kl"] for row in run.rows if row["mismatch/kl"] is not None]
    assert fresh and max(fresh) < 1e-6  # it has the current weights
    assert max(row["lag/max"] for row in run.rows) == 1
    assert_as_if_nothing_had_been(run_dir, tmp_path / "replayed")


def assert_refused_with_fewer_rows(run_dir, saved):
    shorter = run_dir.parent / "shorter.jsonl"
    rows = (QUICKSTART / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    shorter.write_text("".join(rows[:-1]))
    refused = megafork("train", "--resume", run_dir, f"data.train={shorter}")
    assert refused.returncode == 2
    assert (
        f"step_{saved:06d} was trained on other data: data.train={shorter} has " in refused.stderr
    )
    assert "data.allow_changed=true" in refused.stderr


def test_a_run_goes_on_however_it_is_ended(tmp_path):
    """Four times, each while one batch is generated beside the training of another."""
    run_dir = tmp_path / "run"
    again = ("train", "--resume", run_dir)

    # Its launcher is killed.
    settings = (*SETTINGS, "parallel.tp=2", "checkpoint.every=0")
    with middle_of(2, run_dir, *tiny_run(run_dir, *settings)) as (run, _):
        assert len(processes_of(run_dir)) >= 5  # launcher, two ranks, supervisor, server
        run.process.kill()
        assert run.end(30) != 0
        assert left_over(run_dir, seconds=20) == []

    # Its server dies once too often.
    before = journalled(run_dir)
    with middle_of(3, run_dir, *again, "rollout.max_restarts=0") as (run, _):
        run.kill_server()
        assert run.end(100) == 2
    assert "held-out" not in run.told  # step 0's is there, although there was no checkpoint
    assert left_over(run_dir, seconds=20) == []
    assert run.told.count("error:") == 1 and "Traceback" not in run.told
    assert "does not answer" in run.told
    assert_kept(run_dir, before)

    # A signal comes to all its processes at once, the server and its supervisor too.
    before = journalled(run_dir)
    with middle_of(4, run_dir, *again) as (run, _):
        run.signal_all(signal.SIGUSR1)
        assert run.end(60) == INTERRUPTED == 75
    assert left_over(run_dir) == []
    assert 3 <= saved_step(run) <= 4
    assert_kept(run_dir, before)

    # Two signals come to the launcher: the second says nothing new.
    before = journalled(run_dir)
    with middle_of(5, run_dir, *again) as (run, _):
        run.signal(signal.SIGTERM, signal.SIGUSR1)
        assert run.end(60) == INTERRUPTED
    assert left_over(run_dir) == []
    saved = saved_step(run)
    assert 4 <= saved <= 5
    assert (run_dir / "checkpoints" / f"step_{saved:06d}" / "manifest.json").exists()
    assert [row["step"] for row in run.rows] == list(range(1, saved + 1))
    state = read_page(run_dir / "report.html").by_id("state").text
    assert state.startswith(f"not finished: {saved} of {STEPS} steps")
    assert_kept(run_dir, before)

    before = journalled(run_dir)
    assert_refused_with_fewer_rows(run_dir, saved)
    resume(run_dir)
    assert_kept(run_dir, before)
    assert f"has done all of training.steps={STEPS}" in megafork(*again, mark=run_dir).stdout
    assert_as_if_nothing_had_been(run_dir, tmp_path / "replayed")


def saved_step(run):
    """Of a run that a signal has ended: what it says that it saved."""
    pattern = r"stopped by (SIGTERM|SIGUSR1) after step (\d), which is saved"
    said = re.search(pattern, run.told)
    assert said is not None, run.told
    assert f"megafork train --resume {run.run_dir}" in run.told
    assert "Traceback" not in run.told and "error" not in run.told
    return int(said[2])

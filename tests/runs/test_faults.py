"""What ends a run from outside: the launcher or the server dies, or is not the one it should be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megafork.parallel.ports import free_port
from megafork.rollout.journal import Journal
from tests.helpers.commands import (
    ROOT,
    environment,
    left_over,
    lines,
    megafork,
    processes_of,
    serving,
    small_run,
)


def start_against(url, key, run_dir):
    arguments = small_run(run_dir, "parallel.tp=1", "training.steps=3", f"rollout.url={url}")
    return subprocess.Popen(
        [sys.executable, "-m", "megafork", *arguments],
        cwd=ROOT,
        env=environment(run_dir.parent) | {"MEGAFORK_API_KEY": key},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_train_against_a_server_that_runs_already_and_dies_and_comes_back(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving(tmp_path, port):
        refused = start_against(url, "wrong", tmp_path / "wrong")
        assert f"no rollout server answers at rollout.url={url}" in refused.communicate()[1]
        assert refused.returncode == 2
        run = start_against(url, "shared", tmp_path / "run")
        while not (tmp_path / "run" / "rollouts" / "step_000002.jsonl").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.1)
    with serving(tmp_path, port) as server:
        told = run.communicate(timeout=200)[1]
        assert run.returncode == 0, told
        assert told.count("the rollout server died and is replaced") == 1
        assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_a_reward_that_is_no_number_costs_one_update(tmp_path):
    verifier = "reward.verifier=tests.helpers.verifiers:nan_at_the_first"
    done = megafork(*small_run(tmp_path / "run", "parallel.tp=1", verifier), mark=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["update/skipped"] for row in rows] == [1, 0]
    assert [row["reward/nonfinite"] for row in rows] == [8, 0]
    assert all(row["grad_norm"] > 0 and 0 < row["reward/mean"] < 1 for row in rows)
    [path] = (tmp_path / "run" / "skipped").iterdir()
    assert str(path) in done.stderr
    assert "no update, for a reward of response" in done.stderr
    groups = Journal.read(path)
    assert len(groups) == 4  # the mini-batch
    assert sum(not group.is_finite for group in groups) == 1


@pytest.mark.slow
def test_nothing_but_such_rewards_ends_the_run(tmp_path):
    arguments = ["parallel.tp=2", "training.max_skipped=4"]
    verifier = "reward.verifier=tests.helpers.verifiers:infinite"
    run_dir = tmp_path / "run"
    done = megafork(*small_run(run_dir, verifier, *arguments), mark=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "error: step 2: training.max_skipped=4 updates in a row were skipped, the last for" in (
        done.stderr
    )
    assert len(list((run_dir / "skipped").iterdir())) == 4
    [row] = lines(run_dir / "metrics.jsonl")
    assert row["update/skipped"] == 2
    assert row["entropy/mean"] is None and row["grad_norm"] is None and row["reward/mean"] is None
    assert left_over(tmp_path) == []


class Run:
    """A run, at TP=2 unless told otherwise, until it is in the middle of its second step."""

    def __init__(self, folder, *overrides):
        self.folder = folder
        command = [sys.executable, "-m", "megafork", *small_run(folder / "run", *overrides)]
        with (folder / "stderr").open("w") as stderr:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment(folder), stderr=stderr
            )
        self.wait_for("rollouts/step_000002.jsonl")
        assert len(processes_of(folder)) >= 5  # launcher, two ranks, supervisor, server

    def wait_for(self, name, seconds=150):
        deadline = time.monotonic() + seconds
        while not (self.folder / "run" / name).exists():
            assert self.launcher.poll() is None, self.stderr
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def find(self, word):
        """Processes of the run with `word` in their command line."""
        children = psutil.Process(self.launcher.pid).children(recursive=True)
        return [process for process in children if word in process.cmdline()]

    def kill_server(self):
        [supervisor] = self.find("megafork.rollout.supervisor")
        os.killpg(supervisor.pid, signal.SIGKILL)

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()


@pytest.fixture
def start_run(tmp_path):
    runs = []

    def start(*overrides):
        runs.append(Run(tmp_path, *overrides))
        return runs[-1]

    yield start
    for run in runs:
        run.launcher.kill()


@pytest.mark.slow
def test_nothing_outlives_a_killed_launcher(tmp_path, start_run):
    run = start_run("training.steps=500")
    run.launcher.send_signal(signal.SIGKILL)
    assert run.launcher.wait(30) != 0
    assert left_over(tmp_path, seconds=20) == []


@pytest.mark.slow
@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_a_server_that_dies_is_replaced_and_nothing_is_generated_twice(tmp_path, start_run, lag):
    checked = ("sync.check_every=1", "sync.check_prompts=4")
    run = start_run("training.steps=3", f"rollout.max_policy_lag={lag}", *checked)
    before = (tmp_path / "run" / "rollouts" / "step_000002.jsonl").read_bytes()
    run.kill_server()
    assert run.launcher.wait(200) == 0, run.stderr
    assert run.stderr.count("the rollout server died and is replaced") == 1
    assert "does not answer" in run.stderr  # the cause
    assert "supervisor" not in (tmp_path / "run" / "vllm.log").read_text().split("\n")[0]
    assert (tmp_path / "run" / "vllm.1.log").exists()
    after = tmp_path / "run" / "rollouts" / "step_000002.jsonl"
    assert after.read_bytes().startswith(before)
    prompts = [group["prompt_index"] for group in lines(after)]
    assert len(set(prompts)) == len(prompts)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["policy_version"] for row in rows] == [2, 3, 4]
    fresh = [row["mismatch/kl"] for row in rows if row["mismatch/kl"] is not None]
    assert fresh and max(fresh) < 1e-6  # it has the current weights
    assert max(row["lag/max"] for row in rows) == lag
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_a_server_that_dies_once_too_often_ends_the_run_with_its_cause(tmp_path, start_run):
    run = start_run("training.steps=500", "rollout.max_restarts=0")
    run.kill_server()
    assert run.launcher.wait(100) == 2
    assert run.stderr.count("error:") == 1
    assert "does not answer" in run.stderr
    assert "Traceback" not in run.stderr
    assert left_over(tmp_path, seconds=20) == []


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(tmp_path, start_run):
    """Stopped, it answers nothing and keeps its connections: the others' time-out has to end it."""
    layout = ("parallel.tp=1", "parallel.dp=3")
    # Longer than a server needs to start on busy cores: a collective waits for that too.
    run = start_run("training.steps=500", "parallel.timeout_minutes=1.25", *layout)
    [hung] = [rank for rank in run.find("megafork") if rank.environ().get("RANK") == "1"]
    hung.suspend()
    assert run.launcher.wait(200) == 2
    assert run.stderr.count("error") == 1
    found = re.search(
        r"error \(rank \d\): in \w+ of step \d+ a collective was not done within "
        r"parallel\.timeout_minutes=1\.25\. "
        r"(?:Rank 0 did not come; [^;]+; )?"  # where it waits for rank 1's responses
        r"Rank 1 did not come; it has been in \w+ of step \d+ for (\d+) s\n",
        run.stderr,
    )
    assert found is not None, run.stderr
    assert 75 <= int(found[1]) <= 150
    assert "Traceback" not in run.stderr
    assert left_over(tmp_path, seconds=20) == []


@pytest.mark.slow
def test_a_server_of_another_precision_is_stopped_at_the_first_push(tmp_path):
    arguments = ["parallel.tp=1", "rollout.dtype=bfloat16"]
    done = megafork(*small_run(tmp_path / "run", *arguments), mark=tmp_path)
    assert done.returncode == 2
    assert "trainer and rollout server disagree after a weight push" in done.stderr
    assert "Is rollout.dtype the policy's" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert left_over(tmp_path) == []

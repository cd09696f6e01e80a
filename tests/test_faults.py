"""What ends a run from outside: the launcher or the server dies, or is not the one it should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megafork.parallel.ports import free_port
from tests.commands import (
    QUICKSTART,
    ROOT,
    environment,
    left_over,
    lines,
    megafork,
    processes_of,
    small_run,
)


def test_train_against_a_server_that_runs_already(tmp_path):
    port = free_port()
    config, url = str(QUICKSTART / "config.toml"), f"http://127.0.0.1:{port}"
    environ = environment(tmp_path) | {"MEGAFORK_API_KEY": "shared"}
    command = [sys.executable, "-m", "megafork", "serve", config, "run.dir=unused"]
    options = ["--port", str(port), "--log", str(tmp_path / "vllm.log")]
    server = subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        assert url in server.stdout.readline()
        arguments = ["parallel.tp=1", "training.steps=1", f"rollout.url={url}"]
        for key, status in (("wrong", 2), ("shared", 0)):
            done = subprocess.run(
                [sys.executable, "-m", "megafork", *small_run(tmp_path / key, *arguments)],
                cwd=ROOT,
                env=environ | {"MEGAFORK_API_KEY": key},
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode == status, done.stderr
            refused = f"no rollout server answers at rollout.url={url}" in done.stderr
            assert refused == (status == 2)
        assert len(lines(tmp_path / "shared" / "metrics.jsonl")) == 1
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert left_over(tmp_path) == []
    finally:
        server.kill()


@pytest.fixture
def long_run(tmp_path):
    """A run at TP=2 in the middle of its steps, with the server's process group."""
    command = [sys.executable, "-m", "megafork", *small_run(tmp_path / "run", "training.steps=500")]
    with (tmp_path / "stderr").open("w") as stderr:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stderr=stderr)
    try:
        deadline = time.monotonic() + 150
        while not (tmp_path / "run" / "rollouts" / "step_000002.jsonl").exists():
            assert launcher.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(processes_of(tmp_path)) >= 5  # launcher, two ranks, supervisor, server
        yield launcher
    finally:
        launcher.kill()


def test_nothing_outlives_a_killed_launcher(tmp_path, long_run):
    long_run.send_signal(signal.SIGKILL)
    assert long_run.wait(30) != 0
    assert left_over(tmp_path, seconds=20) == []


def test_a_server_that_dies_ends_the_run_with_its_cause(tmp_path, long_run):
    [supervisor] = [
        process
        for process in psutil.Process(long_run.pid).children(recursive=True)
        if "megafork.rollout.supervisor" in process.cmdline()
    ]
    os.killpg(supervisor.pid, signal.SIGKILL)
    assert long_run.wait(100) == 2
    stderr = (tmp_path / "stderr").read_text()
    assert stderr.count("error:") == 1
    assert "does not answer" in stderr
    assert "Traceback" not in stderr
    assert left_over(tmp_path, seconds=20) == []


def test_a_server_of_another_precision_is_stopped_at_the_first_push(tmp_path):
    arguments = ["parallel.tp=1", "rollout.dtype=bfloat16"]
    done = megafork(*small_run(tmp_path / "run", *arguments), mark=tmp_path)
    assert done.returncode == 2
    assert "trainer and rollout server disagree after a weight push" in done.stderr
    assert "Is rollout.dtype the policy's" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    assert left_over(tmp_path) == []

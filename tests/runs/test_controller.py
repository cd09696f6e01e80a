"""A run whose controller or agent is killed, hangs, or is talked to by strangers."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import psutil
import pytest

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.controller import handle
from megafork.controller.handle import Controller
from megafork.errors import UserError
from megafork.parallel.mesh import initialize
from megafork.rollout.messages import Connection
from tests.helpers.commands import left_over, megafork, tiny_run
from tests.helpers.live_runs import middle_of
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow
SETTINGS = ("parallel.tp=2", "training.steps=3", "run.silence_s=10")
PROCESS, AGENT = "megafork.controller.process", "megafork.controller.agent"


def part(run, module):
    """The run's process that runs this module's main."""
    children = psutil.Process(run.process.pid).children(recursive=True)
    [found] = [p for p in children if any(module in word for word in p.cmdline())]
    return found


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "ended: it was killed by SIGKILL"),
        (signal.SIGSTOP, "hangs, nothing was heard of it for 10 s (run.silence_s), and was ended"),
    ],
)
def test_a_lost_controller_ends_the_run_and_loses_nothing(tmp_path, number, cause):
    run_dir = tmp_path / "run"
    arguments = tiny_run(run_dir, *SETTINGS)
    with middle_of(2, run_dir, *arguments) as (run, _):
        run.wait_for(run.journal(2).exists)
        controller = part(run, PROCESS)
        controller.send_signal(number)
        assert run.end(60) == 2
    assert left_over(run_dir, seconds=20) == []
    assert f"error: the controller (process {controller.pid}) {cause}" in run.told
    assert "Traceback" not in run.told
    written = run.journal(1).read_bytes()
    again = megafork("train", "--resume", run_dir, mark=run_dir)
    assert again.returncode == 0, again.stderr
    assert "groups were in the journal" in again.stderr + again.stdout
    assert run.journal(1).read_bytes() == written
    assert [row["step"] for row in run.rows] == [1, 2, 3]


def test_a_lost_agent_takes_its_servers_along_and_the_cause_is_told(tmp_path):
    run_dir = tmp_path / "run"
    with middle_of(2, run_dir, *tiny_run(run_dir, *SETTINGS)) as (run, _):
        part(run, AGENT).kill()
        assert run.end(60) == 2
    assert left_over(run_dir, seconds=20) == []
    assert "warning: the agent of node 0 (" in run.told
    [last] = [line for line in run.told.splitlines() if line.startswith("error")]
    assert "no rollout server came back" in last


def begun_without_an_agent(config):
    mesh = initialize(config.parallel)
    with Controller.connect(config, mesh) as controller, pytest.raises(UserError) as caught:
        controller.begin(0, None)
    return str(caught.value)


def test_an_agent_that_does_not_start_is_told(tmp_path, monkeypatch):
    """Before the controller, which waits for its first word, has heard of it."""
    monkeypatch.setattr(handle, "_AGENT", "tests.helpers.no_agent")
    _, config, *overrides = tiny_run(tmp_path / "run", "parallel.tp=1")
    [told] = run_ranks(1, begun_without_an_agent, load_config(TrainConfig, Path(config), overrides))
    assert told == "the agent of this node did not start: it exited with status 1"


def test_strangers_and_nonsense_do_not_disturb_a_run(tmp_path):
    run_dir = tmp_path / "run"
    with middle_of(2, run_dir, *tiny_run(run_dir, *SETTINGS)) as (run, moment):
        controller = part(run, PROCESS)
        [listening] = [c.laddr for c in controller.net_connections() if c.status == "LISTEN"]
        for nonsense in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xf1frame\x01\xff" + b"\xff" * 64):
            with socket.create_connection(listening, 10) as stranger:
                stranger.sendall(nonsense)
                stranger.settimeout(60)
                if nonsense:
                    assert stranger.recv(1) == b""
        hello = {"role": "rank", "rank": 1, "settings": "of another run"}
        with (
            Connection(tuple(listening), "not the key", hello) as stranger,
            pytest.raises(OSError, match=r"closed|reset|Broken pipe"),
        ):
            stranger.ask({"kind": "batch", "number": 1})
        for process in (controller, part(run, AGENT)):
            mapped = {mapped.path for mapped in process.memory_maps()}
            assert not [path for path in mapped if "libtorch" in path]
        moment.go_on()
        assert run.end() == 0, run.told
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert left_over(run_dir) == []

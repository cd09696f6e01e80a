"""Node launchers, here at addresses of one machine: what ends, how soon, and what is told."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from megafork.cluster.launch import ENDPOINT
from megafork.cluster.launch import Machines as Launched
from megafork.cluster.node_messages import LOST
from megafork.config import ParallelConfig
from megafork.errors import Interrupted, UserError
from megafork.parallel.mesh import initialize
from megafork.parallel.ports import free_port
from megafork.system.signals import INTERRUPTED, STOP_FILE, Interruption
from tests.helpers.commands import QUICKSTART, ROOT, environment, left_over
from tests.helpers.one_node import LOST_AFTER_S
from tools.benchmarks.ranks import run_ranks

TRAIN, SERVER = ("127.0.0.1", "127.0.0.2"), "127.0.0.3"
# What `megafork train` leaves for its launcher when a rank of its own has failed.
FAILS = (
    "import sys, time; from megafork.system import failure_file; time.sleep(1);"
    'failure_file.leave("rank 1 ended with status 1: RuntimeError: first", status=1, log="/log");'
    "sys.exit(1)"
)


class Machines:
    """Their launchers, each with a command; all that they start carries the folder as its mark."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.startup_s = 60  # for all launchers to come, on a busy machine
        self.launchers = {}

    def start(self, node, *command, key="secret"):
        names = {"SLURMD_NODENAME": node, "MEGAFORK_API_KEY": key, "PYTHONPATH": str(ROOT)}
        plan = [",".join(TRAIN), SERVER, str(self.folder), str(self.port), str(self.startup_s)]
        with (self.folder / f"{node}.told").open("w") as told:
            self.launchers[node] = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.one_node", *plan, *command],
                cwd=ROOT,
                env=environment(self.folder) | names,
                stderr=told,
            )

    def statuses(self, seconds=90):
        deadline = time.monotonic() + seconds
        return {
            node: launcher.wait(max(deadline - time.monotonic(), 0.1))
            for node, launcher in self.launchers.items()
        }

    def until(self, name):
        """A command that ends well once the folder has a file of that name."""
        return "bash", "-c", f"until [[ -e '{self.folder}/{name}' ]]; do sleep 0.1; done"

    def told(self, node):
        return (self.folder / f"{node}.told").read_text()

    def cause(self):
        return (self.folder / "cause").read_text()

    def wait_for_commands(self, *nodes):
        """Until those machines' launchers have started their commands."""
        deadline = time.monotonic() + 60
        while not all(self._runs(node) for node in nodes):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _runs(self, node):
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.launchers[node].pid).children()
            return bool(children) and children[0].name() in ("sleep", "bash")


@pytest.fixture
def machines(tmp_path):
    found = Machines(tmp_path)
    yield found
    for launcher in found.launchers.values():
        if launcher.poll() is None:
            launcher.kill()
        launcher.wait()
    assert left_over(tmp_path) == []


def test_the_first_cause_is_told_and_nothing_is_left(machines):
    """The rank that followed is heard of first, and the failing machine after it."""
    machines.start(TRAIN[0], "bash", "-c", "exit 2")
    machines.start(TRAIN[1], sys.executable, "-c", FAILS)
    # A process that has left its parent and its session, as vLLM's engines may.
    machines.start(SERVER, "bash", "-c", "setsid sleep 600 & disown; sleep 600")
    assert set(machines.statuses().values()) == {1}
    cause = "error: 127.0.0.2: rank 1 ended with status 1: RuntimeError: first (see /log)\n"
    assert machines.cause() == cause
    assert machines.told(TRAIN[0]).splitlines()[-1] + "\n" == cause
    assert (machines.folder / "status").read_text() == "1\n"


def test_a_killed_process_is_a_cause(machines):
    machines.start(TRAIN[0], "bash", "-c", "exit 2")
    machines.start(TRAIN[1], "bash", "-c", "kill -KILL $$")
    machines.start(SERVER, "sleep", "600")
    machines.statuses()
    assert "127.0.0.2: the-work was killed by signal 9" in machines.cause()


def test_success_ends_the_servers(machines):
    """Once all machines with ranks have ended: one ends before the other."""
    machines.start(SERVER, "sleep", "600")
    machines.start(TRAIN[1], "true")
    machines.start(TRAIN[0], *machines.until("done"))
    machines.wait_for_commands(SERVER, TRAIN[0])
    (machines.folder / "done").touch()
    assert set(machines.statuses().values()) == {0}
    assert not (machines.folder / "cause").exists()


def test_a_machine_that_does_not_come_is_named(machines):
    """One does not run, the other has the wrong secret."""
    machines.startup_s = 2
    started = time.monotonic()
    machines.start(TRAIN[0], "touch", str(machines.folder / "ran"))
    machines.start(TRAIN[1], "sleep", "600", key="another")
    assert set(machines.statuses().values()) == {LOST}
    assert time.monotonic() - started < machines.startup_s + 15
    assert machines.cause().startswith("error: 127.0.0.2, 127.0.0.3 did not come within 2 s")
    assert not (machines.folder / "ran").exists()


@pytest.mark.parametrize("silent", [TRAIN[0], TRAIN[1]], ids=["coordinator", "other"])
def test_silence_ends_all(machines, silent):
    for node in (*TRAIN, SERVER):
        machines.start(node, "sleep", "600")
    machines.wait_for_commands(*TRAIN, SERVER)
    machines.launchers[silent].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    others = {node: launcher for node, launcher in machines.launchers.items() if node != silent}
    assert {launcher.wait(30) for launcher in others.values()} == {LOST}
    assert time.monotonic() - started < LOST_AFTER_S + 10
    if silent == TRAIN[0]:
        told = machines.told(SERVER)
        assert f"127.0.0.3 lost touch with 127.0.0.1:{machines.port}: nothing heard for 6 s" in told
    else:
        assert "nothing was heard of 127.0.0.2 for 6 s" in machines.cause()
    machines.launchers[silent].send_signal(signal.SIGCONT)  # and finds that it was given up
    assert machines.launchers[silent].wait(30) == LOST


def test_logs_that_cannot_be_written_keep_nothing_alive(machines):
    """They may lie behind the link that was cut: here nobody reads what is written."""
    os.mkfifo(machines.folder / f"launcher-{SERVER}.log")
    for node in (*TRAIN, SERVER):
        machines.start(node, "sleep", "600")
    machines.wait_for_commands(*TRAIN, SERVER)
    sleeping = psutil.Process(machines.launchers[SERVER].pid).children()
    machines.launchers[TRAIN[0]].send_signal(signal.SIGSTOP)
    assert machines.launchers[SERVER].wait(LOST_AFTER_S + 15) == LOST
    assert not any(process.is_running() for process in sleeping)


def test_settings_that_a_serving_machine_refuses_are_the_cause(tmp_path):
    """It is no machine that is lost, which would be tried again."""
    train, serve = "127.0.0.1", "127.0.0.3"
    arguments = [
        "--train", train, "--serve", serve, "--logs", tmp_path, "--port", str(free_port()),
        "--servers", "2", "--startup-s", "40",
        QUICKSTART / "config.toml", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    names = {"MEGAFORK_API_KEY": "secret", "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT)}
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "megafork.cluster", "run", *map(str, arguments)],
            cwd=ROOT,
            env=environment(tmp_path) | names | {"SLURMD_NODENAME": node},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (train, serve)
    ]
    told = [launcher.communicate(timeout=60)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [2, 2], told
    cause = "error: 127.0.0.3: --servers 2 on 1 GPUs of 127.0.0.3: ask for fewer"
    assert (tmp_path / "cause").read_text().startswith(cause)
    assert told[0].splitlines()[-1].startswith(cause)
    assert left_over(tmp_path, 10) == []


def test_a_killed_head_ends_all(machines):
    for node in (*TRAIN, SERVER):
        machines.start(node, "sleep", "600")
    machines.wait_for_commands(*TRAIN, SERVER)
    machines.launchers[TRAIN[0]].kill()
    assert machines.launchers[TRAIN[1]].wait(20) == LOST
    assert machines.launchers[SERVER].wait(20) == LOST


def test_the_request_to_stop_reaches_every_machine(machines):
    """As a file beside the logs; the commands see one of their machine's own."""
    waits = f"until [[ -e ${STOP_FILE} ]]; do sleep 0.1; done; exit {INTERRUPTED}"
    for node in TRAIN:
        machines.start(node, "bash", "-c", waits)
    machines.start(SERVER, "sleep", "600")
    machines.wait_for_commands(*TRAIN, SERVER)
    (machines.folder / "stop").touch()
    assert set(machines.statuses().values()) == {INTERRUPTED}
    assert not (machines.folder / "cause").exists()


def test_a_request_to_stop_that_was_there_first_reaches_all(machines):
    (machines.folder / "stop").touch()
    asked = "until [[ -e $MEGAFORK_STOP_FILE ]]; do sleep 0.1; done; exit 75"
    for node in TRAIN:
        machines.start(node, "bash", "-c", asked)
    machines.start(SERVER, "sleep", "600")
    assert set(machines.statuses().values()) == {75}


def test_a_command_that_cannot_be_started_is_the_cause(machines):
    machines.start(TRAIN[0], "sleep", "600")
    machines.start(TRAIN[1], "/no/such/python")
    machines.start(SERVER, "sleep", "600")
    assert set(machines.statuses().values()) == {1}
    assert "127.0.0.2: the-work cannot be started: [Errno 2]" in machines.cause()


def test_a_stranger_changes_nothing(machines):
    for node in TRAIN:
        machines.start(node, *machines.until("done"))
    machines.start(SERVER, "sleep", "600")
    machines.wait_for_commands(*TRAIN)
    for words in (b"[" * 60_000, '{"hello": "127.0.0.1", "proof": "\u00e9"}'.encode()):
        with socket.create_connection(("127.0.0.1", machines.port)) as stranger:
            stranger.settimeout(60)
            stranger.sendall(words + b"\n")
            assert stranger.recv(1) == b""  # the coordinator has read it, and hangs up
    (machines.folder / "done").touch()
    assert set(machines.statuses().values()) == {0}


def test_long_words_are_cut(machines):
    """To the first line, which the coordinator takes and a job's last line holds."""
    words = (
        "from megafork.system import failure_file; "
        "failure_file.leave('why ' * 20_000 + '\\nmore', status=2)"
    )
    machines.start(TRAIN[0], "sleep", "600")
    machines.start(TRAIN[1], sys.executable, "-c", f"{words}; raise SystemExit(2)")
    machines.start(SERVER, "sleep", "600")
    assert set(machines.statuses().values()) == {2}
    assert re.fullmatch(r"error: 127.0.0.2: (why ?)+( \(see .*\))?\n", machines.cause())


def test_a_signal_to_a_guard_is_a_request_to_stop(machines):
    waits = f"until [[ -e ${STOP_FILE} ]]; do sleep 0.1; done; exit {INTERRUPTED}"
    for node in TRAIN:
        machines.start(node, "bash", "-c", waits)
    machines.start(SERVER, "sleep", "600")
    machines.wait_for_commands(*TRAIN, SERVER)
    machines.launchers[TRAIN[1]].send_signal(signal.SIGUSR1)
    assert set(machines.statuses().values()) == {INTERRUPTED}


def test_the_stop_file_is_a_signal(tmp_path, monkeypatch):
    """Also when it was there first: the signal would have come during the imports."""
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    (tmp_path / "stop").touch()
    try:
        with pytest.raises(Interrupted, match="SIGUSR1"), Interruption() as interruption:
            interruption.defer()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                interruption.check()
                time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def one_rank_does_not_come(here, told):
    """here: a barrier for the two that come; told: one for all, so that the store is there."""
    if os.environ["RANK"] == "2":
        told.wait(120)
        return
    here.wait(120)
    with pytest.raises(UserError) as found:
        initialize(ParallelConfig(tp=3, startup_timeout_s=2.0))
    port = os.environ["MASTER_PORT"]
    assert str(found.value).startswith(
        f"rank 2 did not come to 127.0.0.1:{port} within parallel.startup_timeout_s=2"
    )
    told.wait(120)


def test_a_rank_that_does_not_come_is_named():
    fork = multiprocessing.get_context("fork")
    run_ranks(3, one_rank_does_not_come, fork.Barrier(2), fork.Barrier(3))


def wrong_address():
    os.environ["MASTER_PORT"] = str(free_port())
    if os.environ["RANK"] == "0":
        return
    with pytest.raises(UserError, match=r"rank 1 cannot reach the rendezvous at 127\.0\.0\.1:\d+"):
        initialize(ParallelConfig(tp=2, startup_timeout_s=1.0))


def test_a_wrong_address_is_named():
    run_ranks(2, wrong_address)


@pytest.mark.slow
def test_ranks_of_two_machines_meet_at_one_address(tmp_path):
    """Started as launchers start them; the store listens at the endpoint's address alone."""
    rows = [{"prompt_ids": [4, 5], "response_ids": [6, 7, 8]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endpoint = f"127.0.0.1:{free_port()}"
    launchers = []
    for this in (1, 0):
        machines = Launched(2, this, 1, str(tmp_path / "logs"))
        variables = machines.environment() | {ENDPOINT: endpoint, "GLOO_SOCKET_IFNAME": "lo"}
        command = ["score", "--model", QUICKSTART / "model", "--input", tmp_path / "in.jsonl"]
        command += ["--output", tmp_path / "out.jsonl", "parallel.tp=2", "model.dtype=float32"]
        launchers.append(
            subprocess.Popen(
                [sys.executable, "-m", "megafork", *map(str, command)],
                cwd=ROOT,
                env=environment(tmp_path) | variables,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    heads_sockets = set()
    while launchers[1].poll() is None:
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(launchers[1].pid).net_connections("inet")
            heads_sockets |= {tuple(s.laddr) for s in found if s.status == psutil.CONN_LISTEN}
        time.sleep(0.05)
    told = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert heads_sockets == {("127.0.0.1", int(endpoint.rpartition(":")[2]))}
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(row["logprobs"]) == 3
    assert left_over(tmp_path) == []

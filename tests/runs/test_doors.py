"""What of a run others can reach: its sockets, and its folder while it goes on."""

from __future__ import annotations

import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from torch.distributed import TCPStore

from tests.helpers.commands import left_over, megafork, tiny_run
from tests.helpers.live_runs import LiveRun, middle_of

VALIDATE, PING = b"\0" + (0x3C85F7CE).to_bytes(4, "little"), b"\x0d"
"""What a TCPStore's client begins with"""
PATIENCE_S = 1.0
"""For who answers on this machine at once, if ever"""


def listening(process):
    """{(address, port)} of all TCP sockets on which the process and its children listen."""
    found = set()
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            sockets = member.net_connections("inet")
            found |= {tuple(s.laddr) for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


def takes_requests(address):
    """The status with which a web server answers who has no key; None: it is none."""
    host, port = address
    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
        return httpx.post(f"http://{host}:{port}/megafork/ask", timeout=PATIENCE_S).status_code
    return None


def is_store(address):
    """Whether it answers as a TCPStore does: by the number that it is pinged with."""
    number = b"door"
    with contextlib.suppress(OSError), socket.create_connection(address, PATIENCE_S) as client:
        client.settimeout(PATIENCE_S)
        client.sendall(VALIDATE + PING + number)
        return client.recv(len(number)) == number
    return False


def test_the_search_finds_a_store_and_a_server():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert ("::", store.port) in listening(psutil.Process())
    assert is_store(("127.0.0.1", store.port))
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert not is_store(other.getsockname())


def test_a_run_is_reached_by_nobody_else(tmp_path):
    """A run on two ranks, in the middle of its second batch: loopback alone, and no store."""
    run_dir = tmp_path / "run"
    with middle_of(2, run_dir, *tiny_run(run_dir, "parallel.tp=2")) as (run, moment):
        found = listening(psutil.Process(run.process.pid))
        assert found and {host for host, _ in found} == {"127.0.0.1"}
        with ThreadPoolExecutor(len(found)) as pool:
            statuses = dict(zip(found, pool.map(takes_requests, found), strict=True))
            stores = [a for a, it_is in zip(found, pool.map(is_store, found), strict=True) if it_is]
        assert [status for status in statuses.values() if status is not None] == [401]
        assert stores == []
        assert_no_second_run(run_dir, run.process.pid)
        moment.go_on()
        assert run.end() == 0
    assert left_over(run_dir) == []
    assert not (run_dir / "lock").exists()


def assert_no_second_run(run_dir, pid):
    """Neither a new one, nor one that goes on, nor a plan for one."""
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    for arguments in (
        tiny_run(run_dir, "parallel.tp=1"),
        tiny_run(run_dir, "parallel.tp=2"),
        ["train", "--resume", run_dir],
        ["train", "--resume", run_dir, "--dry-run"],
        [*tiny_run(run_dir), "--dry-run"],
    ):
        done = megafork(*arguments, mark=run_dir.parent)
        assert done.returncode == 2, done.stdout
        [line] = done.stderr.splitlines()
        assert line.startswith(f"error: run.dir={run_dir} is in use by process {pid} on ")
    del before[run_dir / "lock"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_of_two_that_start_at_once_one_goes_on(tmp_path):
    """Past all checks of the other's files, which come before the ranks are started."""
    run_dir = tmp_path / "run"
    one = ("training.steps=1", "parallel.tp=2")
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(
                LiveRun(tmp_path / f"{seed}", *tiny_run(run_dir, *one, f"training.seed={seed}"))
            )
            for seed in (1, 2)
        ]
        statuses = [live.end() for live in both]
    told = [live.told for live in both]
    assert sorted(statuses) == [0, 2], told
    refused, kept = told[statuses.index(2)], 1 + statuses.index(0)
    # "by process N", or "by a process that has just begun" where it has not written its name yet
    assert "is in use by" in refused or "holds another run" in refused
    assert f"seed = {kept}" in (run_dir / "config.toml").read_text()
    for seed in (1, 2):
        assert left_over(tmp_path / f"{seed}") == []


@pytest.mark.parametrize(
    "left",
    [
        "metrics.jsonl",
        "eval.jsonl",
        "samples.jsonl",
        "forking_tokens.jsonl",
        "entropy_histogram.jsonl",
        "skipped/step_000001_minibatch_000.journal",
        "checkpoints/step_000010/manifest.json",
        "checkpoints/final/config.json",
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["start", "dry run"])
def test_a_folder_with_anything_of_another_run_is_refused(tmp_path, left, dry):
    path = tmp_path / "run" / left
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / "rollouts").mkdir()
    path.write_text(json.dumps({"step": 1}) + "\n")
    done = megafork(*tiny_run(tmp_path / "run"), *dry, mark=tmp_path)
    assert done.returncode == 2
    told = "/".join(left.split("/")[:2])
    assert f"run.dir={tmp_path}/run holds another run ({told})" in done.stderr
    assert path.read_text() == '{"step": 1}\n'


def test_what_a_failed_start_left_is_no_run(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "rollouts").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.toml", "vllm.log", "lock"):
        (run_dir / name).touch()
    done = megafork(*tiny_run(run_dir), "rollout.python=/nowhere/python", mark=tmp_path)
    assert "rollout.python=/nowhere/python is not an executable" in done.stderr

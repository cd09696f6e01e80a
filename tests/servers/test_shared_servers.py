"""The servers that a session's tests share: real sessions of pytest, and a server of no model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT, environment, gone_within, left_over, members
from tests.helpers.rollout_servers import stand_in_for_python, wait_for

# Of the tests' own means: what hangs or is left over in any other test shows too.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

TEST = """
import json, os, signal
from pathlib import Path
import psutil
from tests.helpers.blocking import Blocking
from tests.helpers.rollout_servers import wait_for
from tests.helpers.shared_servers import share

FOLDER = Path(__file__).parent

def prepare(folder):
    (FOLDER / f"starter.{os.getpid()}").touch()
    return {"model_path": os.environ["MODEL"], "max_model_len": 64, "max_num_seqs": 8,
            "python": str(FOLDER / "python")}

def visit(factory):
    with share(factory, "small", prepare) as server:
        assert Blocking(server.client()).health()
        visitor = {"process_group": server.process_group, "url": server.url}
        (FOLDER / "unfinished").write_text(json.dumps(visitor))
        os.rename(FOLDER / "unfinished", FOLDER / f"visitor.{os.getpid()}")

"""
PAUSES = "def test_it(tmp_path_factory):\n    visit(tmp_path_factory)\n    signal.pause()\n"
OUTLIVES = """
def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

def test_it(tmp_path_factory):
    visit(tmp_path_factory)
    wait_for(lambda: len(list(FOLDER.glob("visitor.*"))) == 2, 60)
    [starter] = [int(path.suffix[1:]) for path in FOLDER.glob("starter.*")]
    if starter == os.getpid():
        os.kill(starter, signal.SIGKILL)
    wait_for(lambda: has_ended(starter), 60)
    visit(tmp_path_factory)
    (FOLDER / "outlived").touch()
"""
TWO_WORKERS = ["-n", "2", "--dist", "each"]  # each runs every test


@pytest.fixture
def start(tmp_path):
    """Starts pytest on a test file."""
    stand_in_for_python(tmp_path)
    started = []

    def of(test, arguments):
        (tmp_path / "test_it.py").write_text(TEST + test)
        ours = environment(tmp_path) | {"MODEL": str(ROOT / "examples/quickstart/model")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir"]
        session = subprocess.Popen(
            [*command, str(tmp_path), f"--basetemp={tmp_path}/temp", str(tmp_path), *arguments],
            cwd=ROOT,
            env={k: v for k, v in ours.items() if not k.startswith("PYTEST_")},
            stdout=(tmp_path / "output").open("wb"),
            stderr=subprocess.STDOUT,
        )
        started.append(session)
        return session

    yield of
    for session in started:
        session.kill()
        session.wait()


def visitors(folder):
    """What each process found."""
    return [json.loads(path.read_text()) for path in folder.glob("visitor.*")]


@pytest.mark.parametrize("arguments", [[], TWO_WORKERS], ids=["alone", "two workers"])
def test_a_killed_session_leaves_no_server(start, tmp_path, arguments):
    session = start(PAUSES, arguments)
    count = 2 if arguments else 1
    wait_for(lambda: len(visitors(tmp_path)) == count or session.poll() is not None, 120)
    first, *others = visitors(tmp_path)
    assert others == [first] * (count - 1)
    assert len(list(tmp_path.glob("starter.*"))) == 1
    assert len(members(first["process_group"])) == 2  # the supervisor and the server
    os.kill(session.pid, signal.SIGKILL)
    session.wait()
    assert gone_within(first["process_group"], 10)
    assert left_over(tmp_path, 10) == []


def test_a_server_outlives_the_worker_that_started_it(start, tmp_path):
    start(OUTLIVES, TWO_WORKERS).wait(120)
    assert (tmp_path / "outlived").exists(), (tmp_path / "output").read_text()
    first, second = visitors(tmp_path)
    assert first == second
    assert left_over(tmp_path, 10) == []


def test_a_server_that_does_not_start_fails_whoever_needs_it(start, tmp_path):
    test = "def test_it(tmp_path_factory):\n    visit(tmp_path_factory)\n"
    (tmp_path / "python").write_text("#!/bin/sh\necho 'OSError: no weights' >&2\nexit 1\n")
    assert start(test, TWO_WORKERS).wait(120) == 1
    failures = re.findall(
        r"^E +AssertionError: the vLLM server did not",
        (tmp_path / "output").read_text(),
        re.MULTILINE,
    )  # the summary may say it again
    assert len(failures) == 2
    assert len(list(tmp_path.glob("starter.*"))) == 1
    assert left_over(tmp_path, 10) == []


def test_a_group_of_tests_runs_on_one_worker(start, tmp_path):
    """One that is pulled apart would wait for its server's lock."""
    tests = "".join(
        f"\n@pytest.mark.xdist_group('{group}')\ndef test_{group}{number}():\n    note('{group}')\n"
        for number in range(5)
        for group in "ab"
    )
    note = (
        "\nimport pytest\n\ndef note(group):\n"
        "    (FOLDER / f'{group}.{os.getpid()}').touch()\n"
        "    wait_for(lambda: len(list(FOLDER.glob('[ab].*'))) > 1, 60)\n"
    )
    session = start(note + tests, ["-n", "2", "--dist", "loadgroup", "-p", "tests.conftest"])
    assert session.wait(120) == 0, (tmp_path / "output").read_text()
    assert "10 passed" in (tmp_path / "output").read_text()
    assert sorted(path.stem for path in tmp_path.glob("[ab].*")) == ["a", "b"]

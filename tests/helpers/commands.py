"""Runs the command line as a user does, and finds what it left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.forks import Fork, variable

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


MARK = "MEGAFORK_TEST_MARK"


def environment(mark: object = "") -> dict[str, str]:
    """A plain start's environment; all that is started from it carries `mark`."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return inherited | {"OMP_NUM_THREADS": "1", MARK: str(mark)}


def megafork(
    *arguments: object,
    mark: object = "",
    timeout: float = 600,
    prepare: Callable[[], object] = lambda: None,
) -> subprocess.CompletedProcess[str]:
    """`megafork ARGUMENTS`, to its end, in a fork of this process; see forks.py.

    prepare: is called in the fork first.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        fork = Fork(
            tuple(map(str, arguments)),
            environment(mark),
            (MARK,),
            stdout=stdout,
            stderr=stderr,
            prepare=prepare,
        )
        try:
            status = fork.wait(timeout)
        finally:
            fork.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(fork.args, status, stdout.read(), stderr.read())


def executed_megafork(
    *arguments: object, mark: object = "", timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """The same, started as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "megafork", *map(str, arguments)],
        cwd=ROOT,
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def processes_of(mark: object) -> list[str]:
    """Names of the live processes that carry `mark`, whatever they call themselves."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and variable(process, MARK) == str(mark):
                found.append(" ".join(process.cmdline()) or process.name())
    return found


def left_over(mark: object, seconds: float = 2.0) -> list[str]:
    """The same, for those that have not ended within `seconds`."""
    deadline = time.monotonic() + seconds
    while (found := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def small_run(run_dir: Path, *overrides: str) -> list[str]:
    """Arguments of a training run of two steps on the quickstart's task."""
    return [
        "train",
        str(QUICKSTART / "config.toml"),
        f"run.dir={run_dir}",
        "rollout.prompts_per_step=8",
        "rollout.group_size=8",
        "training.prompts_per_minibatch=4",
        "training.steps=2",
        "eval.prompts=32",
        *overrides,
    ]


def tiny_engine(folder: Path) -> Path:
    """An executable in `folder` that runs tests/helpers/tiny_engine.py, given vLLM's command line.

    For `rollout.python`: a run then needs no vLLM, and its servers are up in two seconds.
    """
    path = folder / "tiny-engine"
    imports = f"PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH"
    python = shlex.quote(sys.executable)
    path.write_text(f'#!/bin/sh\n{imports} exec {python} -m tests.helpers.tiny_engine "$@"\n')
    path.chmod(0o755)
    return path


def tiny_run(run_dir: Path, *overrides: str) -> list[str]:
    """The same, on a tiny engine."""
    return small_run(run_dir, f"rollout.python={tiny_engine(run_dir.parent)}", *overrides)


HOLD, HOLD_START = "MEGAFORK_TEST_HOLD", "hold-start"


class Moment:
    """The middle of what a policy generates: its tiny engines stop there until `go_on`.

    A server stops when it has answered `after` groups with the weights `version`.
    """

    def __init__(self, folder: Path, version: int, after: int = 1) -> None:
        self.folder, self.version = folder, version
        self._hold = folder / f"hold-{version}"
        self._hold.write_text(str(after))

    @property
    def variables(self) -> dict[str, str]:
        """Of the run's environment."""
        return {HOLD: str(self.folder)}

    def has_come(self, servers: int = 1) -> bool:
        return len(list(self.folder.glob(f"held-{self.version}-*"))) >= servers

    def go_on(self) -> None:
        self._hold.unlink()

    def hold_starts(self) -> None:
        """Servers that are started again from now on do not come up before `let_start`."""
        (self.folder / HOLD_START).touch()

    def let_start(self) -> None:
        (self.folder / HOLD_START).unlink()


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def members(process_group: int) -> list[psutil.Process]:
    """Processes of a group that run (a zombie waits for its parent alone)."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == process_group and process.status() != "zombie":
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def gone_within(process_group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while members(process_group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def serving(folder, port, *overrides, **variables):
    """`megafork serve` with the key "shared", which is killed in the end."""
    command = [sys.executable, "-m", "megafork", "serve", str(QUICKSTART / "config.toml")]
    options = ["run.dir=unused", *overrides, "--port", str(port)]
    options += ["--log", str(folder / "vllm.log")]
    server = subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env=environment(folder) | {"MEGAFORK_API_KEY": "shared"} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        yield server
    finally:
        server.kill()
        server.wait()


REQUIRED = [
    "run.dir=out",
    "model.path=m",
    "data.train=t.jsonl",
    "reward.verifier=a:b",
    "training.steps=3",
]

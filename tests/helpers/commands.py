"""Runs the command line as a user does, and finds what it left behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"


MARK = "MEGAFORK_TEST_MARK"


def environment(mark: object = "") -> dict[str, str]:
    """A plain start's environment; all that is started from it carries `mark`."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return inherited | {"OMP_NUM_THREADS": "1", MARK: str(mark)}


def megafork(
    *arguments: object, mark: object = "", timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """`megafork ARGUMENTS`, to its end."""
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
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.environ().get(MARK) == str(mark)
            ):
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
def serving(folder, port):
    """`megafork serve` with the key "shared"."""
    command = [sys.executable, "-m", "megafork", "serve", str(QUICKSTART / "config.toml")]
    options = ["run.dir=unused", "--port", str(port), "--log", str(folder / "vllm.log")]
    server = subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        env=environment(folder) | {"MEGAFORK_API_KEY": "shared"},
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

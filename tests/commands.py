"""Runs the command line as a user does, and finds what it left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"


def megafork(*arguments: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """`megafork ARGUMENTS` from a plain start (none of the test's own ranks)."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "megafork", *map(str, arguments)],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def processes_naming(text: object) -> list[str]:
    """Command lines that name `text`; processes on their way out get two seconds."""
    for _ in range(20):
        found = [
            " ".join(process.info["cmdline"])
            for process in psutil.process_iter(["cmdline"])
            if str(text) in " ".join(process.info["cmdline"] or [])
        ]
        if not found:
            break
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

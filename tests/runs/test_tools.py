"""The benchmarks of what collects responses still run; their figures are in docs/benchmarks.md."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT

COMMANDS = {
    "benchmark_collection.py --groups 1 --tokens 64": "| journal |",
    "benchmark_controller_memory.py --prompts 8 --tokens 64 --lag 1 --dropped 0.5": (
        "128 x 64 tokens, lag 1, 50% of the groups dropped: peak "
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_of_the_collector(command):
    tool, *options = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / tool, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and COMMANDS[command] in done.stdout, done.stdout + done.stderr

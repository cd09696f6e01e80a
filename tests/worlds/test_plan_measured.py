"""Planned memory against real training steps in real processes (tools/benchmark_plan.py)."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT, environment
from tools.benchmark_plan import LAYOUTS, MODELS

WITHIN = 0.05
"""Tensors are planned; what is measured has interpreter, libraries and small blocks too."""
EVERY_LAYOUT = ("tp1", "tp2-sp-full", "pp2")
CASES = list(itertools.product(MODELS, EVERY_LAYOUT))


def compared(model, layout):
    """(planned, measured) MiB of each rank, measured by a command of its own.

    A fork of a process that has run other tests has their free memory too: what fills it would
    count as no growth.
    """
    program = ROOT / "tools" / "benchmark_plan.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, "--models", model, "--layouts", layout],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == [model] * len(rows)
    return [(float(planned), float(measured)) for *_, planned, measured, _ in rows]


def assert_planned(model, layout):
    found = compared(model, layout)
    assert len(found) == (1 if layout == "tp1" else 2)
    for rank, (plan, real) in enumerate(found):
        assert real > 250
        assert abs(plan / real - 1) <= WITHIN, f"rank {rank}: {plan:.1f} planned, {real:.1f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_planned_memory_is_measured(case):
    assert_planned(*case)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(EVERY_LAYOUT)))
def test_other_layouts_too(layout):
    assert_planned("qwen3", layout)

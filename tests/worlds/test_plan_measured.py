"""Planned memory against real training steps in real processes (tools/benchmark_plan.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT, environment
from tools.benchmark_plan import LAYOUTS, MODELS

WITHIN = 0.05
"""Tensors are planned; what is measured has interpreter, libraries and small blocks too."""
IN_CI = ("tp1", "tp2-sp-full", "pp2")


def assert_planned(model, layouts):
    """Compare plan and measurement of each rank, by a command of its own.

    A fork of a process that has run other tests has their free memory too: what fills it would
    count as no growth.
    """
    program = ROOT / "tools" / "benchmark_plan.py"
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            program,
            "--models",
            model,
            "--layouts",
            ",".join(layouts),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.splitlines()[2:]
    ]
    ranks = [(model, layout) for layout in layouts for _ in range(1 if layout == "tp1" else 2)]
    assert [(row[0], row[1]) for row in rows] == ranks
    for name, layout, *_, plan, real, _ in rows:
        assert float(real) > 250
        assert abs(float(plan) / float(real) - 1) <= WITHIN, f"{name}, {layout}: {plan}, {real} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_planned_memory_is_measured(model):
    assert_planned(model, IN_CI)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_other_layouts_too():
    assert_planned("qwen3", sorted(set(LAYOUTS) - set(IN_CI)))

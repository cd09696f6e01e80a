"""Planned memory against real training steps in real processes (tools/benchmark_plan.py)."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.layouts import ci_run
from tools.benchmark_plan import LAYOUTS, MODELS, TINY, compare, save_model

WITHIN = 0.05
"""Tensors are planned; what is measured has interpreter, libraries and small blocks too."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_model(root / "tiny", TINY)
    for name, model in MODELS.items():
        save_model(root / name, model.config)
    return root


EVERY_LAYOUT = ("tp1", "tp2-sp-full", "pp2")
CASES = list(itertools.product(MODELS, EVERY_LAYOUT))
IN_CI = [*itertools.product(["qwen3"], EVERY_LAYOUT), ("tied", "tp1")]


@pytest.mark.slow
@pytest.mark.parametrize("case", ci_run(CASES, IN_CI), ids="-".join)
def test_planned_memory_is_measured(folders, case):
    model, layout = case
    for rank, (plan, real) in enumerate(compare(folders / model, folders / "tiny", model, layout)):
        assert real > 250
        assert abs(plan / real - 1) <= WITHIN, f"rank {rank}: {plan:.1f} planned, {real:.1f} MiB"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(EVERY_LAYOUT)))
def test_other_layouts_too(folders, layout):
    for plan, real in compare(folders / "qwen3", folders / "tiny", "qwen3", layout):
        assert abs(plan / real - 1) <= WITHIN, f"{plan:.1f} planned, {real:.1f} MiB"

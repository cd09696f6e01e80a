"""Weights & Biases, MLflow and Trackio, each with its own package, offline."""

from __future__ import annotations

import importlib.util
import json
import math
import random

import pytest

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.metrics.catalogue import CHARTS
from megafork.metrics.log import read_rows
from megafork.trainer.preflight import check_plugins
from tests.helpers import trackers
from tests.helpers.commands import QUICKSTART

NAMES = sorted({name for chart in CHARTS for name, _ in chart.curves if "eval/" not in name})
NOT_FINITE = {"kl/reference": math.nan, "loss/value": -math.inf}


def row(step: int, start: int) -> dict[str, float]:
    drawn = random.Random(10 * step + start)
    values = {name: drawn.uniform(-1, 1) * 10.0 ** drawn.randint(-9, 9) for name in NAMES}
    return values | NOT_FINITE | {"lag/max": step}


def test_all_hold_what_metrics_jsonl_holds_over_a_crash_and_a_resume(tmp_path):
    """Steps 1 to 3, of which the last is done again: the values that came first stay there."""
    run_dir = tmp_path / "run"
    trackers.write(run_dir, tmp_path, 0, {step: row(step, 0) for step in (1, 2, 3)})
    logged = read_rows(run_dir / "metrics.jsonl")
    begun = {
        name: json.loads((run_dir / f"trackers/{name}.json").read_text())["id"]
        for name in trackers.NAMES
    }
    trackers.write(run_dir, tmp_path, 2, {step: row(step, 1) for step in (3, 4)})
    rows = [*logged, read_rows(run_dir / "metrics.jsonl")[-1]]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and len(rows[0]) == 1 + len(NAMES)
    held = trackers.read_back(run_dir, tmp_path)
    for name in trackers.NAMES:
        found = [trackers.as_logged(step, held[name][step]) for step in sorted(held[name])]
        assert found == rows, name
        assert json.loads((run_dir / f"trackers/{name}.json").read_text())["id"] == begun[name]
        assert math.isnan(held[name][1]["kl/reference"]) and held[name][1]["loss/value"] < 0


@pytest.mark.parametrize("name", trackers.NAMES)
def test_a_missing_package_is_told_before_anything_starts(name, tmp_path, monkeypatch):
    """Although a folder of its name, as wandb makes one, can be imported."""
    assert importlib.util.find_spec(name) is None, "the tests' own environment has it"
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(TrainConfig, QUICKSTART / "config.toml", [f'logging.writers=["{name}"]'])
    message = f"logging.writers='{name}' needs the package {name}.*: pip install {name}"
    with pytest.raises(UserError, match=message):
        check_plugins(config)

"""The comparison example: what it plans, what it takes for done, its means and bands."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import pytest

from megafork.config import TrainConfig
from megafork.config.load import load_config, save_config
from megafork.errors import UserError
from megafork.metrics.charts import Curve, mean_curve
from tests.helpers.commands import ROOT

FILE = ROOT / "examples" / "forking_vs_all" / "compare.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("forking_vs_all_compare", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_settings_may_stand_behind_options_of_many_values(compare):
    words = "--arms top all training.lr=1e-4 --seeds 3 4 run.samples=4"
    found = compare.parse(words.split())
    assert (found.arms, found.seeds) == (["top", "all"], [3, 4])
    assert found.overrides == ["training.lr=1e-4", "run.samples=4"]


def planned(compare, out, *arguments):
    return compare.plan(compare.parse([*arguments, "--out", str(out)]))


def finish(run, accuracies, entropies):
    """What `megafork train` leaves behind."""
    (run.dir / "checkpoints" / "final").mkdir(parents=True)
    rows = [{"step": 10 * i, "eval/accuracy": a} for i, a in enumerate(accuracies)]
    (run.dir / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"step": 1 + i, "entropy/mean": e} for i, e in enumerate(entropies)]
    (run.dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_the_selection_differs_between_arms(compare, tmp_path):
    runs = planned(compare, tmp_path, "--seeds", "3", "5", "--steps", "7", "training.lr=1e-3")
    assert [(r.seed, r.arm) for r in runs[:4]] == [(3, arm) for arm in compare.ARMS]
    for seed in (3, 5):
        settings = [
            load_config(TrainConfig, compare.CONFIG, run.overrides)
            for run in runs
            if run.seed == seed
        ]
        assert [s.forking.select for s in settings] == ["top", "random", "bottom", "all"]
        assert {s.forking.rho for s in settings} == {0.2}
        others = [s.model_dump(exclude={"run": True, "forking": {"select"}}) for s in settings]
        assert all(other == others[0] for other in others)
        assert (others[0]["data"]["seed"], others[0]["training"]["seed"]) == (seed, seed)
        assert (others[0]["training"]["lr"], others[0]["training"]["steps"]) == (1e-3, 7)
    assert len({run.dir for run in runs}) == 8


def test_what_the_arms_set_cannot_be_overridden(compare, tmp_path):
    with pytest.raises(UserError, match="use --arms"):
        planned(compare, tmp_path, "forking.select=all")


def test_runs_of_other_settings_are_not_compared(compare, tmp_path):
    run, *_ = planned(compare, tmp_path, "--steps", "7")
    run.check()
    assert run.command()[4] == str(compare.CONFIG)
    run.dir.mkdir(parents=True)
    save_config(load_config(TrainConfig, compare.CONFIG, run.overrides), run.dir / "config.toml")
    run.check()
    assert run.command()[4:6] == ["--resume", str(run.dir)]
    planned(compare, tmp_path, "--steps", "7", "parallel.tp=2")[0].check()
    with pytest.raises(UserError, match=r"training\.steps=7, not 8"):
        planned(compare, tmp_path, "--steps", "8")[0].check()


def test_means_and_errors_by_hand():
    # Deviations of 1, 2, 6 from their mean 3: 4 + 1 + 9 = 14; of 0, 0, 3 from 1: 1 + 1 + 4 = 6.
    curves = [
        Curve("", [0, 10], [1.0, 0.0]),
        Curve("", [0, 10, 20], [2.0, 0.0, 9.0]),
        Curve("", [10, 0], [3.0, 6.0]),
    ]
    found = mean_curve("arm", curves)
    assert found.steps == [0, 10]
    assert found.values == pytest.approx([3.0, 1.0])
    assert found.errors == pytest.approx([math.sqrt(14 / 2 / 3), math.sqrt(6 / 2 / 3)])
    assert mean_curve("arm", [Curve("", [0], [1.0])]).errors == [0.0]


def test_the_report_is_of_the_seeds_that_all_arms_have(compare, tmp_path):
    runs = planned(compare, tmp_path, "--arms", "top", "all", "--seeds", "0", "1", "2")
    final = {("top", 0): 0.30, ("top", 1): 0.40, ("all", 0): 0.25, ("all", 1): 0.25, ("top", 2): 1}
    for run in runs:
        if (run.arm, run.seed) in final:
            finish(run, [0.2, final[run.arm, run.seed]], [0.5, 0.1 * (1 + run.seed)])
    assert [run.is_complete for run in runs] == [True, True, True, True, True, False]
    compare.report(runs, 0.2, tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    # sqrt(2 * 0.05^2) = 7.1%, sqrt(2 * 0.05^2) of the entropies 0.1 and 0.2
    assert lines[2:] == [
        "| top 20% (forking tokens) | 35.0% | 7.1% | 30.0% | 40.0% | 0.150 | 0.071 |",
        "| all tokens | 25.0% | 0.0% | 25.0% | 25.0% | 0.150 | 0.071 |",
    ]
    rows = (tmp_path / "comparison.csv").read_text().splitlines()
    assert rows[1:3] == ["top,0,0,0.2,", "top,0,10,0.3,"]
    assert len(rows) == 9
    assert (tmp_path / "comparison.png").stat().st_size > 10_000

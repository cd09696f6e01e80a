"""A run whose every plug-in is one of examples/plugins, and which every tracker follows."""

from __future__ import annotations

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import trackers
from tests.helpers.commands import QUICKSTART, executed_megafork, left_over, lines, tiny_run

PLUGINS = "examples.plugins."


@pytest.mark.slow
def test_a_run_of_plugins_alone(tmp_path, monkeypatch):
    for name, value in trackers.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    data = QUICKSTART / "data"
    for part in ("train", "heldout"):
        rows = [json.loads(row) for row in (data / f"{part}.jsonl").read_text().splitlines()]
        columns = "\n".join(f"{row['prompt']}\t{row['answer']}" for row in rows)
        (tmp_path / f"{part}.tsv").write_text(f"prompt\tanswer\n{columns}\n")
    done = executed_megafork(
        *tiny_run(
            tmp_path / "run", "parallel.tp=2",
            f"data.train={tmp_path / 'train.tsv'}", f"data.eval={tmp_path / 'heldout.tsv'}",
            f"data.reader={PLUGINS}reader:rows",
            f"algorithm.objective={PLUGINS}objective:penalized",
            f"algorithm.advantages={PLUGINS}advantages:leave_one_out",
            f"forking.select={PLUGINS}selection:surprisal",
            f'algorithm.credit=["{PLUGINS}credit:by_entropy", "{PLUGINS}credit:early"]',
            f'logging.writers=["{PLUGINS}writer:Table","tensorboard","wandb","mlflow","trackio"]',
        ),
        mark=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert left_over(tmp_path) == []
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    table = (tmp_path / "run" / "metrics.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in table] == [str(row["step"]) for row in rows]
    assert_held(tmp_path / "run", tmp_path, rows)
    for row in rows:
        assert 0 <= row["penalized/far_fraction"] <= 1
        assert row["ratio/first_update_max_offset"] == 0.0
        assert 0.2 <= row["forking/kept_fraction"] < 0.3
        assert row["entropy/threshold"] is None  # the scores are no entropies
        assert math.isfinite(row["loss/policy"])
        assert "ratio/clip_low_fraction" not in row


def assert_held(run_dir, folder, rows):
    """Every tracker has every metric of every step, as metrics.jsonl has it; TensorBoard too, as
    float32."""
    for name, steps in trackers.read_back(run_dir, folder).items():
        assert [trackers.as_logged(step, steps[step]) for step in sorted(steps)] == rows, name
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    for name in rows[0].keys() - {"step"}:
        scalars = events.Scalars(name)
        known = [math.nan if row[name] is None else row[name] for row in rows]
        assert [scalar.step for scalar in scalars] == [row["step"] for row in rows]
        found = [scalar.value if math.isfinite(scalar.value) else math.nan for scalar in scalars]
        assert found == pytest.approx(known, rel=1e-6, nan_ok=True), name

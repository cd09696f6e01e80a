"""Entropy, threshold, length and accuracy along a run's training, from what the run has logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megafork.analysis.output import write_table
from megafork.errors import UserError
from megafork.metrics.charts import draw_run
from megafork.metrics.run_files import read_metrics

_COLUMNS = {
    "entropy/p50": "entropy_p50_nats",
    "entropy/p80": "entropy_p80_nats",
    "entropy/p95": "entropy_p95_nats",
    "entropy/mean": "entropy_mean_nats",
    "entropy/threshold": "threshold_nats",
    "forking/kept_fraction": "kept_fraction",
    "response/length_mean": "response_length_mean_tokens",
    "response/truncated_fraction": "truncated_fraction",
    "reward/accuracy": "training_accuracy",
}
_HELD_OUT = "held_out_accuracy"


def training_table(run: Path) -> list[dict[str, Any]]:
    """Return one row a step, with the evaluations' (step 0 is before training); None where nothing
    was logged. Raises UserError for a folder without metrics, or damaged ones."""
    metrics, evaluations = read_metrics(run)
    if not metrics:
        raise UserError(f"{run}: no metrics.jsonl with a step: give the folder of a run")
    table: dict[int, dict[str, Any]] = {
        step: {"step": step} | dict.fromkeys([*_COLUMNS.values(), _HELD_OUT])
        for step in sorted({row["step"] for row in metrics + evaluations})
    }
    for row in metrics:
        table[row["step"]] |= {name: row.get(key) for key, name in _COLUMNS.items()}
    for row in evaluations:
        table[row["step"]][_HELD_OUT] = row.get("eval/accuracy")
    return list(table.values())


def write_training(rows: list[dict[str, Any]], run: Path, folder: Path) -> None:
    """Write training.csv and training.json with the table's rows, and the run's training.png."""
    source = run.resolve().name
    write_table(folder, "training", rows, {"source": source})
    draw_run(run, folder / "training.png", source)

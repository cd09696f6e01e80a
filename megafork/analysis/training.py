"""Entropy, threshold, length and accuracy along a run's training, from what the run has logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megafork.analysis.output import BLUE, GREEN, GREY, ORANGE, figure, write_table
from megafork.errors import UserError
from megafork.logging.metrics import read_rows

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
    """One row a step, with the evaluations' (step 0 is before training); None where nothing was
    logged. Raises UserError for a folder without metrics, or damaged ones."""
    metrics, evaluations = _rows(run / "metrics.jsonl"), _rows(run / "eval.jsonl")
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


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_rows(path)
        if any(type(row["step"]) is not int for row in rows):
            raise ValueError("a step is no integer")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return rows


def write_training(rows: list[dict[str, Any]], source: str, folder: Path) -> None:
    """training.csv, .json, .png"""
    write_table(folder, "training", rows, {"source": source})
    panels = (
        (
            "entropy (nats)",
            (
                ("95th percentile", "entropy_p95_nats", ORANGE, "-"),
                ("80th percentile", "entropy_p80_nats", BLUE, "-"),
                ("median", "entropy_p50_nats", GREEN, "-"),
                ("mean", "entropy_mean_nats", GREY, "--"),
                ("threshold of the forking tokens", "threshold_nats", "black", ":"),
            ),
        ),
        (
            "response length (tokens)",
            (("mean of the sampled responses", "response_length_mean_tokens", BLUE, "-"),),
        ),
        (
            "accuracy",
            (
                ("training prompts (before dynamic sampling)", "training_accuracy", BLUE, "-"),
                ("held-out prompts", _HELD_OUT, ORANGE, "o-"),
            ),
        ),
    )
    with figure(folder / "training.png", [1] * len(panels), height=9.0) as axes:
        for one, (unit, lines) in zip(axes, panels, strict=True):
            for label, column, colour, style in lines:
                points = [(row["step"], row[column]) for row in rows if row[column] is not None]
                if points:
                    one.plot(*zip(*points, strict=True), style, color=colour, label=label)
            one.set_ylabel(unit)
            one.set_ylim(0.0, 1.05 * one.get_ylim()[1])
            one.set_xlim(left=0.0)
            one.grid(alpha=0.3)
            if one.lines:
                one.legend(
                    frameon=False,
                    fontsize="small",
                    ncols=3,
                    loc="lower left",
                    bbox_to_anchor=(0.0, 1.0),
                )
        axes[0].figure.suptitle(source, fontsize="medium")
        axes[-1].set_xlabel("training step")

"""Table and figure of a sweep of two temperatures."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafork.rollout.sampling import TwoTemperatures

_Z = 1.959964  # of a 95% interval

Sample = dict[str, Any]
"""A response as it is kept: a line of samples/*.jsonl, which `megafork score` reads."""


@dataclass(frozen=True)
class Interval:
    """A mean over problems with its 95% confidence interval: normal, over problems, cut to what is
    possible. NaN: one problem has none."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(
        cls, values: Sequence[float], least: float = -math.inf, most: float = math.inf
    ) -> Interval:
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, math.nan, math.nan)
        half = _Z * statistics.stdev(values, mean) / math.sqrt(len(values))
        return cls(mean, max(least, mean - half), min(most, mean + half))


@dataclass(frozen=True)
class Evaluation:
    """What one pair of temperatures gave: a number for each problem, in the file's order."""

    temperatures: TwoTemperatures
    accuracy: list[float]
    """Share of right responses: avg@k"""
    length: list[float]
    """Mean response tokens"""
    truncated: list[float]
    """Share of responses that did not end"""

    @classmethod
    def of(cls, temperatures: TwoTemperatures, samples: Iterable[Sample]) -> Evaluation:
        problems: dict[int, list[Sample]] = {}
        for sample in samples:
            problems.setdefault(sample["problem"], []).append(sample)
        groups = [problems[index] for index in sorted(problems)]
        return cls(
            temperatures,
            [statistics.fmean(s["accuracy"] for s in group) for group in groups],
            [statistics.fmean(len(s["response_ids"]) for s in group) for group in groups],
            [statistics.fmean(s["truncated"] for s in group) for group in groups],
        )

    def row(self, baseline: Evaluation) -> dict[str, float]:
        """One line of the table. `change` is from T = 1 on the same problems, so its interval is
        narrower than the two accuracies' own."""
        pairs = zip(self.accuracy, baseline.accuracy, strict=True)
        columns = {
            "accuracy": Interval.of(self.accuracy, 0.0, 1.0),
            "change": Interval.of([ours - theirs for ours, theirs in pairs]),
            "length": Interval.of(self.length, 0.0),
            "truncated": Interval.of(self.truncated, 0.0, 1.0),
        }
        row = {"above": self.temperatures.above, "below": self.temperatures.below}
        for name, interval in columns.items():
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return row


def write_results(evaluations: list[Evaluation], about: dict[str, Any], output: Path) -> Path:
    """OUTPUT/temperatures.{csv,json,png}; each appears when it is complete. Returns the figure.

    evaluations: T = 1 on both sides first. about: what the JSON and the figure's title say of them.
    """
    rows = [evaluation.row(evaluations[0]) for evaluation in evaluations]
    with whole(output / "temperatures.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with whole(output / "temperatures.json") as partial:
        finite = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]
        partial.write_text(json.dumps(about | {"rows": finite}, indent=1))
    path = output / "temperatures.png"
    with whole(path) as partial:
        _draw(rows, about, partial)
    return path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; the file takes its name when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw(rows: list[dict[str, float]], about: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "accuracy": (f"accuracy, avg@{about['samples']} (%)", 100),
        "length": ("response length (tokens)", 1),
        "truncated": ("truncated responses (%)", 100),
    }
    curves = {
        "above": (
            f"of tokens with entropy above {about['threshold']:g} nats (others: 1)",
            "#D55E00",
        ),
        "below": ("of the other tokens (those above: 1)", "#0072B2"),
    }
    figure, every_axes = pyplot.subplots(
        len(panels), 1, figsize=(7.2, 8.4), sharex=True, layout="constrained"
    )
    for axes, (name, (label, scale)) in zip(every_axes, panels.items(), strict=True):
        for side, (meaning, color) in curves.items():
            other = "below" if side == "above" else "above"
            points = sorted((row for row in rows if row[other] == 1.0), key=lambda row: row[side])
            middle = [scale * row[name] for row in points]
            margins = [
                [scale * abs(row[name] - row[f"{name}_{end}"]) for row in points]
                for end in ("low", "high")
            ]
            axes.errorbar(
                [row[side] for row in points],
                middle,
                yerr=margins,
                marker="o",
                capsize=3,
                color=color,
                label=f"temperature {meaning}",
            )
        axes.axvline(1.0, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    every_axes[0].legend(frameon=False, fontsize="small")
    every_axes[0].set_title(
        f"{about['problems']} problems, {about['samples']} responses each; bars: 95% over problems",
        fontsize="small",
    )
    every_axes[-1].set_xlabel("temperature that is varied (0: greedy)")
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)

"""Draw what runs have logged: the catalogue's charts, the time, the histogram and comparisons.

The page takes its drawings as SVG elements (`drawings`, `histogram`); curves.png, training.png and
the comparison of several runs are charts above one another in one PNG.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megafork.metrics.catalogue import CHARTS, OVERVIEW, Chart
from megafork.metrics.palette import CURVES
from megafork.metrics.run_files import Row, RunFiles, read_metrics
from megafork.system.disk import naming

_INK = "#010203"
"""Becomes the ink of the page, which is another one in the dark."""
_DASHES = ("-", "--", ":", "-.")
_FEW = 60
"""Up to so many steps each has a dot."""
_PHASES = ("generate", "reference", "value", "score", "update", "sync")
"""time/total is these and little more; an evaluation comes on top, rewards are within generate."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.0,
    **dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        _INK,
    ),
}


@dataclass(frozen=True)
class Curve:
    """A line of a chart, a value for each step; NaN is a gap."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] = ()
    """half the height of a band around the values; empty for a line without one"""

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


@dataclass(frozen=True)
class Drawing:
    """A figure of the page."""

    title: str
    svg: Markup
    metrics: tuple[str, ...]
    """names of the metrics that it shows"""
    note: str = ""


def read_curve(run_dir: Path, name: str) -> Curve:
    """Read a metric of metrics.jsonl, or of eval.jsonl for a name in eval/; empty where no row has
    it. Raises UserError for a damaged file."""
    return _curve(name, name, *read_metrics(run_dir))


def draw_run(run_dir: Path, path: Path, title: str = "") -> Path:
    """Write accuracy, entropy, threshold and length over a run's steps to the PNG `path`. Returns
    it. Raises UserError for a damaged metrics.jsonl or eval.jsonl."""
    rows = read_metrics(run_dir)
    panels = [(chart, list(_curves(chart, *rows).values())) for chart in OVERVIEW]
    return draw_panels(path, [(chart, curves) for chart, curves in panels if curves], title)


def draw_panels(
    path: Path, panels: Sequence[tuple[Chart, Sequence[Curve]]], title: str = ""
) -> Path:
    """Write charts, one above the other on the same steps, to the PNG `path`. Returns it."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.2 + 2.4 * len(panels)), layout="constrained")
        axes = figure.subplots(max(len(panels), 1), sharex=True, squeeze=False)[:, 0]
        for one, (chart, curves) in zip(axes, panels, strict=False):
            one.set_title(chart.title, loc="right", fontsize="medium")
            one.set_ylabel(chart.unit)
            _plot(one, chart, curves)
            one.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
        axes[-1].set_xlabel("step")
        figure.suptitle(title, fontsize="medium")
        partial = path.with_name(path.name + ".partial")
        with naming(partial):
            figure.savefig(partial, dpi=120, format="png")
    return partial.replace(path)


def mean_curve(label: str, curves: Sequence[Curve]) -> Curve:
    """The mean over several runs' curves, with its standard error, at the steps that all have.

    The error is the standard deviation (n - 1) / sqrt(n); 0 for one curve, which shows no spread.
    """
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    columns = [[values[step] for values in by_step] for step in steps]
    return Curve(
        label,
        steps,
        [statistics.fmean(column) for column in columns],
        [deviation(column) / math.sqrt(len(column)) for column in columns],
    )


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (n - 1); 0 of one value, NaN where one is NaN."""
    if any(map(math.isnan, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def drawings(run: RunFiles) -> Iterator[Drawing]:
    """Draw those charts of which the run has values, and where the time went."""
    for chart in CHARTS:
        curves = _curves(chart, run.metrics, run.evaluations)
        if curves:
            figure, axes = _axes("step", chart.unit)
            _plot(axes, chart, list(curves.values()))
            yield Drawing(chart.title, _svg(figure, axes, chart.title), tuple(curves), chart.note)
    if any(row.get("time/total") for row in run.metrics):
        yield _time(run.metrics)


def histogram(run: RunFiles) -> Drawing | None:
    """Draw the first and the last step's, each with its threshold; None where a run has none."""
    if not run.histograms:
        return None
    thresholds = {row["step"]: row.get("entropy/threshold") for row in run.metrics}
    figure, axes = _axes("entropy (nats), log scale", "share of the step's loss tokens", width=8.0)
    ends = run.histograms[:: max(len(run.histograms) - 1, 1)]
    for row, colour, dash in zip(ends, CURVES[1::-1][-len(ends) :], ("--", "-"), strict=False):
        edges, total = _on_log_scale(row["edges"]), max(sum(row["tokens"]), 1)
        shares = [count / total for count in row["tokens"]]
        label = f"step {row['step']}: {total:,} tokens"
        axes.stairs(shares, edges, color=colour, linestyle=dash, label=label)
        if row is ends[-1]:
            selected = [count / total for count in row["selected"]]
            label = f"forking tokens of step {row['step']}"
            axes.stairs(selected, edges, color=colour, fill=True, alpha=0.35, label=label)
        if (threshold := thresholds.get(row["step"])) is not None:
            label = f"threshold {threshold:.4g}"
            axes.axvline(threshold, color=colour, linestyle=dash, linewidth=1.2, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(_on_log_scale(ends[0]["edges"])[0], ends[0]["edges"][-1])
    note = (
        f"The leftmost bin is all that is below {ends[0]['edges'][1]:g} nats. A threshold is the "
        "mean over the step's mini-batches."
    )
    if len(ends) == 1:
        note += " One step has a histogram so far."
    title = "Entropy histogram, first and last step"
    return Drawing(title, _svg(figure, axes, title), ("entropy_histogram.jsonl",), note)


def _on_log_scale(edges: Sequence[float]) -> list[float]:
    """Give the bin from 0, which has no place on the scale, three of its neighbour's widths."""
    return [edges[1] * (edges[1] / edges[2]) ** 3, *edges[1:]]


def _curves(chart: Chart, metrics: Sequence[Row], evaluations: Sequence[Row]) -> dict[str, Curve]:
    """Return the chart's curves that have a value, by metric; none where `needs` says so."""
    if chart.needs and not any(
        value > 0
        for name in chart.needs
        for value in _curve(name, name, metrics, evaluations).finite
    ):
        return {}
    found = {name: _curve(name, label, metrics, evaluations) for name, label in chart.curves}
    return {name: curve for name, curve in found.items() if curve.finite}


def _curve(name: str, label: str, metrics: Sequence[Row], evaluations: Sequence[Row]) -> Curve:
    """Return a metric's values: null is a gap, and a missing key is no point."""
    rows = evaluations if name.startswith("eval/") else metrics
    found = {row["step"]: row[name] for row in rows if name in row}
    values = [math.nan if value is None else float(value) for value in found.values()]
    return Curve(label, list(found), values)


def _plot(axes: Axes, chart: Chart, curves: Sequence[Curve]) -> None:
    for colour, dash, curve in zip(CURVES, cycle(_DASHES), curves, strict=False):
        shown = [v if v > 0 else math.nan for v in curve.values] if chart.is_log else curve.values
        axes.plot(
            curve.steps,
            shown,
            color=colour,
            linestyle=dash,
            marker="o",
            markevery=_dotted(shown),
            label=curve.label,
        )
        if curve.errors:
            low = [v - e for v, e in zip(shown, curve.errors, strict=True)]
            high = [v + e for v, e in zip(shown, curve.errors, strict=True)]
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.2, linewidth=0)
    tops = [v + e for c in curves for v, e in zip_longest(c.values, c.errors, fillvalue=0.0)]
    known = [value for curve in curves for value in curve.finite]
    if chart.is_log:
        axes.set_yscale("log")
    elif chart.is_from_zero and min(known, default=-1.0) >= 0.0:
        axes.set_ylim(0.0, 1.05 * max(filter(math.isfinite, tops)) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dotted(values: Sequence[float]) -> list[int]:
    """Return the points that get a dot: all of few; of many, those without a neighbour to draw a
    line to."""
    if len(values) <= _FEW:
        return list(range(len(values)))
    is_gap = [True, *(math.isnan(value) for value in values), True]
    return [i for i in range(len(values)) if is_gap[i] and is_gap[i + 2]]


def _time(rows: Sequence[Row]) -> Drawing:
    """Stack the phases' seconds; what no phase took is "other"."""
    steps = [row["step"] for row in rows]
    parts = {name: [row.get(f"time/{name}") or 0.0 for row in rows] for name in _PHASES}
    totals = [row.get("time/total") or 0.0 for row in rows]
    parts["other"] = [
        max(total - sum(seconds), 0.0)
        for total, *seconds in zip(totals, *parts.values(), strict=True)
    ]
    parts["evaluation"] = [row.get("time/eval") or 0.0 for row in rows]
    parts = {name: seconds for name, seconds in parts.items() if any(seconds)}
    figure, axes = _axes("step", "seconds")
    # A stack over one step alone would have no width.
    edges = [steps[0] - 0.5, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 0.5]
    below = [0.0] * len(steps)
    for colour, (name, seconds) in zip(CURVES, parts.items(), strict=False):
        above = [a + b for a, b in zip(below, seconds, strict=True)]
        axes.stairs(above, edges, baseline=below, fill=True, color=colour, label=name)
        below = above
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = "Time of a step"
    note = "Rewards are computed within generate."
    if any(row.get("time/offload") for row in rows):
        note += " Other has the ways between device and host (time/offload, time/onload)."
    metrics = tuple(f"time/{name}" for name in (*_PHASES, "total"))
    return Drawing(title, _svg(figure, axes, title), metrics, note)


def _axes(x_label: str, y_label: str, width: float = 5.4) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, axes: Axes, title: str) -> Markup:
    """Return an element of the page, whose text is text, whose ink is the page's and whose ids are
    its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :].replace(_INK, "currentColor")
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))

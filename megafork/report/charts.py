"""A run's curves, its time and its histogram, drawn by matplotlib into the page as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megafork.report.catalogue import CHARTS, Chart
from megafork.report.files import Row, RunFiles
from megafork.report.palette import CURVES

Points = tuple[list[int], list[float]]
"""Steps and values; NaN is a gap."""
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
class Drawing:
    title: str
    svg: Markup
    metrics: tuple[str, ...]
    """that it shows"""
    note: str = ""


def drawings(run: RunFiles) -> Iterator[Drawing]:
    """Yield the charts of which the run has values, and where the time went."""
    for chart in CHARTS:
        curves = [(name, label, _points(run, name)) for name, label in chart.curves]
        curves = [curve for curve in curves if _has_value(curve[2])]
        is_off = chart.needs and not any(_largest(run, name) > 0 for name in chart.needs)
        if curves and not is_off:
            metrics = tuple(name for name, *_ in curves)
            yield Drawing(chart.title, _lines(chart, curves), metrics, chart.note)
    if any(row.get("time/total") for row in run.metrics):
        yield _time(run.metrics)


def histogram(run: RunFiles) -> Drawing | None:
    """Draw the entropies of the first and the last step with their thresholds; None without any."""
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
    """The bin from 0 gets three of its neighbour's widths."""
    return [edges[1] * (edges[1] / edges[2]) ** 3, *edges[1:]]


def _points(run: RunFiles, name: str) -> Points:
    """Null is a gap, a missing key is no point."""
    rows = run.evaluations if name == "eval/accuracy" else run.metrics
    found = [(row["step"], _number(row[name])) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _has_value(points: Points) -> bool:
    return any(map(math.isfinite, points[1]))


def _largest(run: RunFiles, name: str) -> float:
    return max((v for v in _points(run, name)[1] if math.isfinite(v)), default=0.0)


def _lines(chart: Chart, curves: Sequence[tuple[str, str, Points]]) -> Markup:
    figure, axes = _axes("step", chart.unit)
    for i, (_, label, (steps, values)) in enumerate(curves):
        shown = [v if v > 0 else math.nan for v in values] if chart.is_log else values
        axes.plot(
            steps,
            shown,
            color=CURVES[i],
            linestyle=_DASHES[i % len(_DASHES)],
            marker="o",
            markevery=_dotted(shown),
            label=label,
        )
    known = [v for *_, (_, values) in curves for v in values if math.isfinite(v)]
    if chart.is_log:
        axes.set_yscale("log")
    elif min(known) >= 0.0:
        axes.set_ylim(0.0, 1.05 * max(known) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, axes, chart.title)


def _dotted(values: Sequence[float]) -> list[int]:
    """Return which points are dots: all of few, and of many those that no line reaches."""
    if len(values) <= _FEW:
        return list(range(len(values)))
    is_gap = [True, *(math.isnan(value) for value in values), True]
    return [i for i in range(len(values)) if is_gap[i] and is_gap[i + 2]]


def _time(rows: Sequence[Row]) -> Drawing:
    """Stacked; what no phase took is "other"."""
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
    """Return the figure as an element of the page, with its text as text and ids of its own."""
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

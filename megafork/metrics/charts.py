"""Draw what runs have logged: the catalogue's charts, the time, the histogram and comparisons.

The page takes its drawings as SVG elements (`drawings`, `histogram`); curves.png, training.png and
the comparison of several runs are charts above one another in one PNG.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megafork.metrics.catalogue import CHARTS, OVERVIEW, Chart
from megafork.metrics.hover import readings
from megafork.metrics.palette import CURVES
from megafork.metrics.run_files import Row, RunFiles, read_metrics
from megafork.system.disk import naming

_INK = "#010203"
"""Becomes the ink of the page, which is another one in the dark."""
_DASHES = ("-", "--", ":", "-.")
_FEW = 60
"""Up to so many steps each has a dot."""
_SHORT = 26
"""Characters of a label, two of which fit beside each other"""
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
    intervals: Sequence[tuple[float, float]] = ()
    """the ends of a bar through each value; empty for a line without them"""

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]

    @property
    def is_constant(self) -> bool:
        """Tell whether it has several values, all of them equal."""
        return len(self.finite) > 1 and min(self.finite) == max(self.finite)


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
    """Draw those charts of which the run has values that change, and where the time went."""
    for chart in CHARTS:
        curves = _curves(chart, run.metrics, run.evaluations)
        changing = {name: curve for name, curve in curves.items() if not _is_folded(name, curve)}
        if changing:
            yield draw(chart, chart.title, changing)
    if any(row.get("time/total") for row in run.metrics):
        yield _time(run.metrics)


def draw(chart: Chart, title: str, curves: Mapping[str, Curve]) -> Drawing:
    """Draw curves, each under the name of its metric or run, over the steps."""
    figure, axes = _axes(chart.unit)
    with matplotlib.rc_context(_STYLE):
        _plot(axes, chart, list(curves.values()))
    return Drawing(
        title, _svg(figure, axes, title, list(curves.values())), tuple(curves), chart.note
    )


def constants(run: RunFiles) -> dict[str, Curve]:
    """The curves that `drawings` leaves out because they have one value at all steps, by metric."""
    return {
        name: curve
        for chart in CHARTS
        for name, curve in _curves(chart, run.metrics, run.evaluations).items()
        if _is_folded(name, curve)
    }


def compared(runs: Mapping[str, RunFiles]) -> Iterator[Drawing]:
    """Draw each metric of the charts that two runs or more have, a curve for each run by its name.

    One that has the same value in all runs at all steps is left out.
    """
    for chart in CHARTS:
        of_runs = {
            run: _curves(chart, files.metrics, files.evaluations) for run, files in runs.items()
        }
        for metric, label in chart.curves:
            curves = {
                run: replace(found[metric], label=run)
                for run, found in of_runs.items()
                if metric in found
            }
            values = {value for curve in curves.values() for value in curve.finite}
            if len(curves) > 1 and len(values) > 1:
                title = chart.title if len(chart.curves) == 1 else f"{chart.title}: {label}"
                yield replace(draw(chart, title, curves), metrics=(metric,))


def _is_folded(name: str, curve: Curve) -> bool:
    """Held-out results are few, and worth a look where they are equal."""
    return curve.is_constant and not name.startswith("eval/")


def histogram(run: RunFiles) -> Drawing | None:
    """Draw the first and the last step's, each with its threshold; None where a run has none."""
    if not run.histograms:
        return None
    thresholds = {row["step"]: row.get("entropy/threshold") for row in run.metrics}
    figure, axes = _axes("share of the step's loss tokens", width=6.5)
    axes.set_xlabel("entropy (nats), log scale")
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
    found = {row["step"]: row for row in rows if name in row}
    low, high = f"{name}_low", f"{name}_high"
    has_interval = any(low in row for row in found.values())
    intervals = [(_number(row.get(low)), _number(row.get(high))) for row in found.values()]
    values = [_number(row[name]) for row in found.values()]
    return Curve(label, list(found), values, intervals=intervals if has_interval else ())


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plot(axes: Axes, chart: Chart, curves: Sequence[Curve]) -> None:
    """Plot the curves, the first on top. One that runs along those above it is a broad pale line,
    so that both are seen."""
    for i, (colour, dash, curve) in enumerate(zip(CURVES, cycle(_DASHES), curves, strict=False)):
        shown = [v if v > 0 else math.nan for v in curve.values] if chart.is_log else curve.values
        is_beneath = any(_is_along(curve, above, chart.is_from_zero) for above in curves[:i])
        look: dict[str, Any] = (
            {"linewidth": 6.0, "alpha": 0.45, "solid_capstyle": "butt"}
            if is_beneath
            else {"linestyle": dash, "marker": "o", "markevery": _dotted(shown)}
        )
        axes.plot(
            curve.steps,
            shown,
            color=colour,
            label=_plain(curve.label),
            zorder=3.0 - 0.1 * i,
            **look,
        )
        if curve.intervals:
            lengths = [
                [abs(end - v) for v, end in zip(shown, ends, strict=True)]
                for ends in zip(*curve.intervals, strict=True)
            ]
            axes.errorbar(
                curve.steps, shown, lengths, fmt="none", ecolor=colour, elinewidth=1.2, capsize=2.5
            )
        if curve.errors:
            low = [v - e for v, e in zip(shown, curve.errors, strict=True)]
            high = [v + e for v, e in zip(shown, curve.errors, strict=True)]
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.2, linewidth=0)
    tops = [v + e for c in curves for v, e in zip_longest(c.values, c.errors, fillvalue=0.0)]
    tops += [high for curve in curves for _, high in curve.intervals]
    known = [value for curve in curves for value in curve.finite]
    if chart.is_log:
        axes.set_yscale("log")
    elif chart.is_from_zero and min(known, default=-1.0) >= 0.0:
        axes.set_ylim(0.0, 1.05 * max(filter(math.isfinite, tops)) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain(label: str) -> str:
    """Return the label without what matplotlib takes for mathematics or for no label at all."""
    return f" {label}".replace("$", r"\$") if label.startswith("_") else label.replace("$", r"\$")


def _is_along(curve: Curve, above: Curve, is_from_zero: bool) -> bool:
    """Tell whether two curves with the same steps are apart by a line's width on average."""
    apart = [abs(a - b) for a, b in zip(curve.values, above.values, strict=False)]
    known = [distance for distance in apart if math.isfinite(distance)]
    if len(known) < 2 or list(curve.steps) != list(above.steps):
        return False
    both = [*curve.finite, *above.finite]
    floor = min(*both, 0.0) if is_from_zero else min(both)
    return statistics.fmean(known) <= 0.03 * (max(both) - floor)


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
    figure, axes = _axes("seconds")
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
    curves = [Curve(name, steps, seconds) for name, seconds in parts.items()]
    return Drawing(title, _svg(figure, axes, title, curves), metrics, note)


def _axes(unit: str, width: float = 4.5) -> tuple[Figure, Axes]:
    """Return a figure of the page with one axis, which names its unit; the page says that charts
    are over the steps."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, 2.8), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.set_ylabel(unit)
        axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, axes: Axes, title: str, curves: Sequence[Curve] = ()) -> Markup:
    """Return an element of the page, whose text is text, whose ink is the page's and whose ids are
    its own; the values of `curves` at a step are shown where the pointer is."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        lines, labels = axes.get_legend_handles_labels()
        columns = 2 if max(map(len, labels)) <= _SHORT else 1
        figure.legend(lines, labels, loc="outside upper left", ncols=columns)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :].replace(_INK, "currentColor")
    svg = svg.replace("</svg>", f"{readings(figure, axes, curves)}</svg>")
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1))

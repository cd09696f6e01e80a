"""The values at a step, shown where the pointer is, in drawings of a page without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MOST = 120
"""Places with a reading: of more steps, some are left out, to keep pages small"""
_FONT, _LINE, _CHARACTER = 9.0, 11.5, 5.0
"""Sizes of the reading's text, and a character's width, in points"""


class Values(Protocol):
    """A line of a chart, a value for each step; NaN is a gap."""

    @property
    def label(self) -> str: ...
    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def values(self) -> Sequence[float]: ...


def readings(figure: Figure, axes: Axes, curves: Sequence[Values]) -> Markup:
    """Return SVG elements of class "at", one a step: a strip of the plot that shows, while it is
    pointed at or tapped, a line at the step and a box with the curves' values."""
    steps = sorted({step for curve in curves for step in curve.steps})
    if not steps:
        return Markup()
    steps = sorted({*steps[:: math.ceil(len(steps) / _MOST)], steps[-1]})
    figure.draw_without_rendering()  # which lays it out
    height = figure.bbox.height
    left, right = axes.bbox.x0, axes.bbox.x1
    top, bottom = height - axes.bbox.y1, height - axes.bbox.y0
    at = [float(axes.transData.transform((step, axes.get_ylim()[0]))[0]) for step in steps]
    edges = [left, *((a + b) / 2 for a, b in pairwise(at)), right]
    known = [(curve.label, dict(zip(curve.steps, curve.values, strict=True))) for curve in curves]
    found = Markup()
    for i, (step, x) in enumerate(zip(steps, at, strict=True)):
        lines = [f"step {step}"] + [
            f"{label} {values[step]:.4g}"
            for label, values in known
            if math.isfinite(values.get(step, math.nan))
        ]
        found += Markup(
            '<g class="at"><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
            '<g><path d="M{:.1f} {:.1f}V{:.1f}"/>{}</g></g>'
        ).format(
            *(edges[i], top, edges[i + 1] - edges[i], bottom - top, x, top, bottom),
            _box(lines, x, top, (left, right)),
        )
    return found


def _box(lines: Sequence[str], x: float, top: float, room: tuple[float, float]) -> Markup:
    """Return the text on a ground, beside x, on the side with more room."""
    width = _CHARACTER * max(map(len, lines)) + 10
    start = x + 4 if x < sum(room) / 2 else x - 4 - width
    start = min(max(start, room[0]), room[1] - width)
    text = Markup().join(
        Markup('<tspan x="{:.1f}" dy="{}">{}</tspan>').format(start + 5, _LINE, line)
        for line in lines
    )
    return Markup(
        '<rect class="ground" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="3"/>'
        '<text y="{:.1f}" font-size="{}">{}</text>'
    ).format(start, top, width, _LINE * len(lines) + 6, top, _FONT, text)

"""RUN/report.html: a run in one file that opens offline, without a script or a request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from megafork.metrics import palette
from megafork.metrics.charts import constants, drawings, histogram
from megafork.metrics.run_files import Row, RunFiles, read_run
from megafork.metrics.shaded_tokens import sampled_steps, visible
from megafork.system.disk import naming, refuse_links


@dataclass(frozen=True)
class Headline:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Range:
    """A metric over the run; None where no step has a value."""

    name: str
    first: float | None
    last: float | None
    low: float | None
    high: float | None


def write_report(run_dir: Path, target: Path | None = None) -> Path:
    """Write the page of what is in `run_dir` to `target` (run_dir/report.html), under its name only
    when it is whole. Raises UserError where there is no run."""
    refuse_links(run_dir, "the run's folder")
    path = run_dir / "report.html" if target is None else target
    return write_page(path, render(read_run(run_dir)))


def write_page(path: Path, page: str) -> Path:
    """Write a page under its name only when it is whole. Returns the path."""
    partial = path.with_name(path.name + ".partial")
    with naming(partial):
        # A lone surrogate, which JSON can carry, is no character of UTF-8.
        partial.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return partial.replace(path)


def template(name: str) -> Template:
    """Return a template of this folder."""
    environment = Environment(
        loader=PackageLoader("megafork.metrics", package_path=""),
        autoescape=True,  # the text of a model is in it
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "short": short}
    return environment.get_template(name, globals={"palette": palette, "written": now()})


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def render(run: RunFiles) -> str:
    steps = sampled_steps(run.samples)
    return template("page.html.jinja").render(
        run=run,
        state=state_of(run),
        headlines=headlines(run),
        drawings=list(drawings(run)),
        constants=constants(run),
        histogram=histogram(run),
        ranges=ranges(run.metrics),
        tokens=run.tokens[-1] if run.tokens else None,
        sampled=steps,
        left_out=sorted({row["step"] for row in run.samples} - {one.step for one in steps}),
    )


def state_of(run: RunFiles) -> str:
    """Return the state that the files tell.

    They do not tell a run that goes on from one that was ended.
    """
    of = f"{run.steps_done} of {run.num_steps or 'unknown'} steps"
    if run.is_finished:
        return f"finished: {of}"
    metrics = run.dir / "metrics.jsonl"
    if not metrics.is_file():
        return f"not finished: {of}"
    last = datetime.fromtimestamp(metrics.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"not finished: {of}, the last at {last}"


def headlines(run: RunFiles) -> list[Headline]:
    """The numbers that a reader looks for first, as far as the run has them."""
    found = []
    if scored := [row for row in run.evaluations if row.get("eval/accuracy") is not None]:
        ends = scored[:1] + scored[1:][-1:]
        value = " \u2192 ".join(f"{row['eval/accuracy']:.1%}" for row in ends)
        note = " to ".join(f"step {row['step']}" for row in ends)
        samples = [row["eval/samples"] for row in ends if row.get("eval/samples") is not None]
        if samples:
            note += f", {' and '.join(map(str, dict.fromkeys(samples)))} responses"
        found.append(Headline("Held-out accuracy", value, note))
    if trained := _values(run.metrics, "reward/accuracy"):
        value = f"{trained[0]:.1%} \u2192 {trained[-1]:.1%}"
        found.append(Headline("Training accuracy", value, "first to last step"))
    if tokens := _values(run.metrics, "tokens"):
        note = f"response tokens in {len(tokens)} steps"
        found.append(Headline("Trained on", f"{int(sum(tokens)):,}", note))
    if seconds := _values(run.metrics, "time/total"):
        total = sum(seconds) + sum(_values(run.metrics, "time/eval"))
        note = "its steps and their evaluations, without what comes before and between"
        found.append(Headline("Time", duration(total), note))
    if skipped := _values(run.metrics, "update/skipped"):
        found.append(Headline("Skipped updates", f"{int(sum(skipped))}"))
    if mismatch := _values(run.metrics, "mismatch/kl"):
        note = f"nats, last step; {max(mismatch):.3g} at most"
        found.append(Headline("KL of engine and trainer", f"{mismatch[-1]:.3g}", note))
    return found


def duration(seconds: float) -> str:
    """Two units: 3 d 4 h, 2 h 5 min, 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, size, below, name in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // below)} {name}"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def ranges(rows: Sequence[Row]) -> list[Range]:
    """Return the range of every metric, by name."""
    found = []
    for name in sorted({name for row in rows for name in row} - {"step"}):
        values = [row.get(name) for row in rows]
        finite = _values(rows, name)
        low, high = (min(finite), max(finite)) if finite else (None, None)
        found.append(Range(name, values[0], values[-1], low, high))
    return found


def short(value: Any) -> str:
    """Six digits at most; a dash for null."""
    return "\u2013" if value is None else f"{value:.6g}"


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]

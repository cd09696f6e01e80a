"""The files that a run has left in its folder, read as far as they are there: it may be live."""

from __future__ import annotations

import tomllib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from megafork.errors import UserError
from megafork.metrics.log import read_rows

Row = dict[str, Any]
Numbers = dict[str, float | None]
"""a row of metrics.jsonl or eval.jsonl"""


class _Token(TypedDict):
    id: int
    count: int
    selected: int
    mean_entropy: float
    text: str


class _Tokens(TypedDict):
    """A row of forking_tokens.jsonl."""

    step: int
    tokens: int
    selected: int
    min_count: int
    highest_entropy: list[_Token]
    most_selected: list[_Token]


class _Histogram(TypedDict):
    """A row of entropy_histogram.jsonl."""

    step: int
    edges: list[float]
    tokens: list[int]
    selected: list[int]


class _Response(TypedDict):
    """A row of samples.jsonl."""

    step: int
    uid: int
    prompt: str
    token_ids: list[int]
    text: list[str]
    entropies: list[float] | None
    selected: list[bool]
    rollout_logprobs: list[float]
    reward: float
    accuracy: float
    advantage: float | None
    threshold: float | None
    truncated: bool
    loss: bool


_KINDS: dict[str, Any] = {
    "metrics.jsonl": Numbers,
    "eval.jsonl": Numbers,
    "forking_tokens.jsonl": _Tokens,
    "entropy_histogram.jsonl": _Histogram,
    "samples.jsonl": _Response,
}
_OF_TOKENS = ("token_ids", "text", "entropies", "selected", "rollout_logprobs")
_CONFIG = "config.toml"
_JSONL = {
    "metrics.jsonl": "no step has ended yet",
    "eval.jsonl": "nothing was evaluated (data.eval)",
    "forking_tokens.jsonl": "off (forking.report_tokens=0), or no entropies were known",
    "entropy_histogram.jsonl": "no entropies were known, or an older version wrote the run",
    "samples.jsonl": "off (run.samples_every=0), or an older version wrote the run",
}


@dataclass(frozen=True)
class RunFiles:
    """The rows of each file in the order of their steps, none of a step twice."""

    dir: Path
    settings: str
    """config.toml as it is; empty where it is not there"""
    num_steps: int | None
    """that the settings ask for; None where they do not say"""
    metrics: Sequence[Row]
    evaluations: Sequence[Row]
    tokens: Sequence[Row]
    histograms: Sequence[Row]
    samples: Sequence[Row]
    is_exported: bool
    """whether the last policy's HF folder is there"""
    missing: dict[str, str]
    """what is not there, and why that may be"""

    @property
    def steps_done(self) -> int:
        return max((row["step"] for row in self.metrics), default=0)

    @property
    def is_finished(self) -> bool:
        return self.is_exported and self.num_steps is not None and self.steps_done >= self.num_steps


def read_run(run_dir: Path) -> RunFiles:
    """Read a run's folder. Raises UserError where there is no run, and for a damaged line, which it
    names."""
    config, metrics = run_dir / _CONFIG, run_dir / "metrics.jsonl"
    if not config.is_file() and not metrics.is_file():
        what = "no run in this folder" if run_dir.is_dir() else "no such folder"
        raise UserError(
            f"{run_dir}: {what} (no {_CONFIG}, no {metrics.name}): give the run.dir of a run"
        )
    settings = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    rows = {name: _rows_of_steps(run_dir / name) for name in _JSONL}
    missing = {} if settings else {_CONFIG: "the run's settings are unknown"}
    return RunFiles(
        dir=run_dir,
        settings=settings,
        num_steps=_num_steps(settings),
        metrics=_once(rows["metrics.jsonl"], "step"),
        evaluations=_once(rows["eval.jsonl"], "step"),
        tokens=_once(rows["forking_tokens.jsonl"], "step"),
        histograms=_once(rows["entropy_histogram.jsonl"], "step"),
        samples=_once(rows["samples.jsonl"], "step", "uid"),
        is_exported=(run_dir / "checkpoints" / "final").is_dir(),
        missing=missing | {name: why for name, why in _JSONL.items() if not rows[name]},
    )


def read_metrics(run_dir: Path) -> tuple[list[Row], list[Row]]:
    """Return the rows of metrics.jsonl and of eval.jsonl, one a step; none of a missing file.

    Raises UserError for a damaged line, which it names.
    """
    metrics, evaluations = (
        _once(_rows_of_steps(run_dir / name), "step") for name in ("metrics.jsonl", "eval.jsonl")
    )
    return metrics, evaluations


def _rows_of_steps(path: Path) -> list[Row]:
    rows = read_rows(path)
    for row in rows:
        if (fault := _fault(row, _KINDS[path.name])) is not None:
            raise UserError(f"{path} is damaged ({fault}): {str(row)[:80]}")
    return rows


def _fault(row: Any, kind: Any) -> str | None:
    """Return why a row is not one that a run wrote."""
    try:
        msgspec.convert(row, kind)
    except ValueError as error:  # a ValidationError, or half of a surrogate pair
        return str(error)
    if type(row.get("step")) is not int or row["step"] < 0:
        return "a row without a step"
    columns = [row[name] for name in _OF_TOKENS] if kind is _Response else []
    if len({len(column) for column in columns if column is not None}) > 1:
        return "columns of different lengths"
    counts = [row["tokens"], row["selected"]] if kind is _Histogram else []
    if any(len(count) != len(row["edges"]) - 1 for count in counts):
        return "counts that do not fit the edges"
    return None


def _num_steps(settings: str) -> int | None:
    """Another version's settings may be other ones: nothing else of them is read."""
    try:
        return int(tomllib.loads(settings)["training"]["steps"])
    except (ValueError, KeyError, TypeError):
        return None


def _once(rows: Iterable[Row], *key: str) -> list[Row]:
    """The last row of each key, where a step was done again; by step, in the file's order."""
    latest: dict[Hashable, Row] = {tuple(row[name] for name in key): row for row in rows}
    return sorted(latest.values(), key=lambda row: row["step"])

"""Several runs on one page: their curves over each other, and the settings that differ."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megafork.errors import UserError
from megafork.metrics.charts import compared
from megafork.metrics.page import headlines, state_of, template, write_page
from megafork.metrics.palette import CURVES
from megafork.metrics.run_files import RunFiles, read_run

_ABSENT = "\u2013"


@dataclass(frozen=True)
class Line:
    """A line of a table: what it is of, and a text for each run."""

    name: str
    texts: list[str]


def write_comparison(run_dirs: Sequence[Path], target: Path) -> Path:
    """Write the page of two to eight runs to `target`, under its name only when it is whole.

    Raises UserError for another number of runs, for a folder that is given twice or is no run, for
    a run of which no step has ended, and for a damaged file.
    """
    if not 2 <= len(run_dirs) <= len(CURVES):
        raise UserError(
            f"{len(run_dirs)} runs: give 2 to {len(CURVES)} runs to compare; "
            "megafork report RUN shows a single one"
        )
    runs = {name: read_run(folder) for name, folder in zip(_names(run_dirs), run_dirs, strict=True)}
    for run in runs.values():
        if not run.metrics:
            raise UserError(f"{run.dir}: no step has ended yet, so there is nothing to compare")
    page = template("side_by_side.html.jinja").render(
        runs=runs, results=_results(runs), settings=_differing(runs), drawings=list(compared(runs))
    )
    return write_page(target, page)


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell all of them apart."""
    paths = [folder.resolve() for folder in run_dirs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"{run_dirs[i]} is given twice: name each run once")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return [str(Path(*path.parts[-length:])) for path in paths]


def _results(runs: Mapping[str, RunFiles]) -> list[Line]:
    """Return the state of each run and the headlines of its report, as far as it has them."""
    found = [{one.label: one.value for one in headlines(run)} for run in runs.values()]
    labels = dict.fromkeys(label for of_run in found for label in of_run)
    lines = [Line(label, [of_run.get(label, _ABSENT) for of_run in found]) for label in labels]
    return [Line("State", [state_of(run) for run in runs.values()]), *lines]


def _differing(runs: Mapping[str, RunFiles]) -> list[Line]:
    """Return the settings that are not the same in all runs; run.dir, which never is, apart."""
    settings = [_settings(run) for run in runs.values()]
    keys = sorted({key for of_run in settings for key in of_run} - {"run.dir"})
    lines = [Line(key, [of_run.get(key, _ABSENT) for of_run in settings]) for key in keys]
    return [line for line in lines if len(set(line.texts)) > 1]


def _settings(run: RunFiles) -> dict[str, str]:
    """Return the run's settings by section.key; none where its config.toml is missing."""
    try:
        sections: dict[str, Any] = tomllib.loads(run.settings)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{run.dir / 'config.toml'} is damaged ({error})") from None
    return {
        f"{section}.{key}": str(value)
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }

"""Tables as CSV and JSON, and figures, which all analyses write. Each file appears whole."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy

from megafork.errors import UserError
from megafork.system.disk import naming
from megafork.system.printable import as_cell

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Okabe and Ito's colours, which colour-blind readers tell apart."""
GREY = "#777777"

Row = dict[str, Any]


def make_folder(folder: Path) -> Path:
    """Make the output folder where it is missing. Raises UserError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made: {error}") from None
    return folder


def rows_of(**columns: numpy.ndarray | Sequence[Any]) -> list[Row]:
    """Rows of a table from its columns, all of one length; numbers of arrays become Python's."""
    values = [c.tolist() if isinstance(c, numpy.ndarray) else c for c in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def write_table(folder: Path, name: str, rows: Sequence[Row], about: Row) -> None:
    """Write NAME.csv with the rows, NAME.json with `about` and the rows; NaN is empty or null.

    In the CSV, text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    with (
        whole_file(folder / f"{name}.csv") as path,
        path.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
    write_json(folder / f"{name}.json", {**about, "rows": list(rows)})


def write_json(path: Path, document: Row) -> None:
    """Write an object as JSON, indented by one; NaN is null."""
    with whole_file(path) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Name of a file to write, which becomes `path` at the end; after an error it is removed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(partial):
            yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def figure(path: Path, rows: Sequence[int] = (1,), *, height: float = 4.2) -> Iterator[list[Any]]:
    """Figure with an Axes for each of `rows`, its relative height; written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(
        len(rows),
        1,
        figsize=(7.2, height),
        height_ratios=rows,
        layout="constrained",
        squeeze=False,
    )
    try:
        for one in axes[:, 0]:
            one.spines[["top", "right"]].set_visible(False)
        yield list(axes[:, 0])
        with whole_file(path) as partial:
            drawn.savefig(partial, dpi=110, format="png")
    finally:
        pyplot.close(drawn)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return as_cell(value)
    return "" if isinstance(value, float) and math.isnan(value) else value

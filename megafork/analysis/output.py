"""Tables as CSV and JSON, and figures, which all analyses write. Each file appears whole."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def write_table(folder: Path, name: str, rows: Sequence[Row], about: Row) -> list[Path]:
    """Write NAME.csv with the rows, NAME.json with `about` and the rows; NaN is empty or null.

    In the CSV, text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows({k: _cell(v) for k, v in row.items()} for row in rows)
    document = {**about, "rows": list(rows)}
    return [
        _write(folder / f"{name}.csv", text.getvalue()),
        write_json(folder / f"{name}.json", document),
    ]


def write_json(path: Path, document: Any) -> Path:
    text = json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False)
    return _write(path, text + "\n")


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
        partial = path.with_name(path.name + ".partial")
        drawn.savefig(partial, dpi=110, format="png")
        partial.replace(path)
    finally:
        pyplot.close(drawn)


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    with naming(partial):
        partial.write_text(text, encoding="utf-8")
    return partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if _is_nan(value) else value


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return as_cell(value)
    return "" if _is_nan(value) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)

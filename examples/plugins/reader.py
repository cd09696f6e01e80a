"""A reader of one's own: rows of a file of tab-separated values, whose first line names columns.

megafork train config.toml data.reader=reader:rows data.train=train.tsv data.eval=eval.tsv
"""

import csv
from collections.abc import Iterator
from pathlib import Path


def rows(path: str) -> Iterator[dict[str, str]]:
    """Yield a dict for each row, in the file's order, which has to be the same at every call."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t")

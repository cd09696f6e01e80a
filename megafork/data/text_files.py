"""Rows of text files: jsonl, json and csv, each as .gz too.

A byte order mark and the line ends of Windows are no part of the rows.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from megafork.errors import UserError
from megafork.system.parsing import parse_json

KINDS = (
    ".jsonl, .json, .csv or .tsv (each as .gz too), .parquet, a folder that datasets' save_to_disk "
    "wrote, or hf:owner/name[:split]"
)
_SEPARATORS = {".csv": ",", ".tsv": "\t"}

Table = Iterator[tuple[str, Any]]
"""(where, row): the place for messages, and the row, which jsonl does not promise to be a dict"""


class Number(str):
    """A number's text: as it stands in a jsonl, or the shortest decimal of a table's type.

    As a float 0.00005 would become 5e-05, and of twenty digits four would be lost.
    """


def kind_of(path: Path) -> str:
    """Return the suffix that tells a file's kind, .jsonl of data.jsonl and of data.jsonl.gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def read_text_table(path: Path) -> Table:
    """Yield the rows of a .csv, .tsv or .json file, and of any other as jsonl.

    Raises UserError, naming the file and row, for what cannot be read.
    """
    kind = kind_of(path)
    if kind in _SEPARATORS:
        return _read_csv(path, _SEPARATORS[kind])
    return _read_json(path) if kind == ".json" else read_jsonl(path)


def read_jsonl(
    path: Path, *, number: Callable[[str], Any] | None = Number, kinds: str = KINDS
) -> Table:
    """Yield the rows of the lines that are not blank.

    number: see `parse_json`. kinds: what can be given in place of this file. Raises UserError,
    naming the file and line, for what is not UTF-8 or not JSON.
    """
    with _opened(path, kinds) as lines:
        for count, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}, line {count}", _parsed(line, f"{path}, line {count}", number)


def _read_json(path: Path) -> Table:
    """Yield the rows of one JSON list, or of lines of JSON, which many call .json too."""
    with _opened(path) as lines:
        first = next((line for line in lines if line.strip()), "")
        if not first.lstrip().startswith("["):
            yield from read_jsonl(path)
            return
        text = first + lines.read()
    for count, row in enumerate(_parsed(text, str(path), Number), 1):
        yield f"{path}, row {count}", row


def _read_csv(path: Path, separator: str) -> Table:
    """Yield the rows below the line of names; every value is a text, an absent one None."""
    csv.field_size_limit(sys.maxsize)  # a solution may be longer than the module's 131,072
    with _opened(path, newline="") as lines:
        reader = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise UserError(f"{path}: two columns have one name ({', '.join(names)})")
            for count, row in enumerate(reader, 1):
                where = f"{path}, row {count}"
                if None in row:
                    raise UserError(
                        f"{where} has more cells than the {len(names)} columns that the first line "
                        'names: put a cell that holds the separator into "quotes"'
                    )
                yield where, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parsed(text: str, where: str, number: Callable[[str], Any] | None) -> Any:
    try:
        return parse_json(text, number)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None


@contextlib.contextmanager
def _opened(path: Path, kinds: str = KINDS, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file, packed or not. Raises UserError for what is not UTF-8 or not gzip."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline=newline) as packed:
                yield packed
        else:
            with path.open(encoding="utf-8-sig", newline=newline) as plain:
                yield plain
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}: give {kinds}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): copy it again") from None

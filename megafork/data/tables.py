"""Rows of a data file: text, parquet, a folder of datasets' save_to_disk, or a hub's data set."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from megafork.data.columns import Wanted
from megafork.data.text_files import KINDS, Number, Table, kind_of, read_text_table
from megafork.errors import UserError
from megafork.system.plugins import load_plugin

HUB = "hf:"
_BATCH_ROWS = 1024
_LFS = b"version https://git-lfs"


def files_of(given: str | Path | Sequence[str]) -> list[str]:
    """Return the files that a path, a pattern with * or ?, or a list of these names, in the order
    of the list, those of a pattern by name. Raises UserError for a pattern that fits none."""
    names = [str(given)] if isinstance(given, str | Path) else list(given)
    files: list[str] = []
    for name in names:
        if name.startswith(HUB) or Path(name).exists() or not glob.has_magic(name):
            files.append(name)
            continue
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"no file fits the pattern {name}: give {KINDS}, or a list of these")
        files += found
    return files


def read_table(path: str | Path, wanted: Wanted) -> Table:
    """Yield the rows in order, with at least the columns that are wanted.

    Raises UserError, naming the file and row, for what cannot be read.
    """
    name = str(path)
    if name.startswith(HUB):
        return _from_hub(name, wanted)
    path = Path(path)
    if path.is_dir():
        return _from_folder(path, wanted)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist: give {KINDS}")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(
                f"{path} is only git's pointer to a large file: fetch that with git lfs pull"
            )
    return _from_parquet(path, wanted) if kind_of(path) == ".parquet" else read_text_table(path)


def read_with(reader: str, path: str | Path) -> Table:
    """Yield the rows that the plug-in `data.reader=reader` gives of a file, in its order.

    Raises UserError for a reader that cannot be loaded or fails, with the number of the row.
    """
    number = 0
    try:
        for number, row in enumerate(load_plugin("data.reader", reader, {})(str(path)), 1):
            yield f"{path}, row {number}", _with_number_texts(row)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"data.reader={reader!r} failed on {path} after {number} rows "
            f"({type(error).__name__}: {error})"
        ) from error


def _with_number_texts(value: Any) -> Any:
    """Return the value with `Number` for every float in it."""
    if isinstance(value, dict):
        return {name: _with_number_texts(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_number_texts(inner) for inner in value]
    return _text_of_float(value) if isinstance(value, float | numpy.floating) else value


def stem_of(path: str | Path) -> str:
    """A data file's short name: aime_2024 of data/aime_2024.jsonl, math-500-test of
    hf:owner/math-500:test, test of data/test-*.parquet."""
    name = str(path)
    if name.startswith(HUB):
        return name.removeprefix(HUB).split("/", 1)[-1].replace("/", "-").replace(":", "-")
    found = Path(path)
    if glob.has_magic(name) and not found.exists():
        plain = re.sub(r"[*?\[\]]+", "", found.name.partition(".")[0]).strip("-_")
        return plain or found.absolute().parent.name
    if kind_of(found) in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        return Path(found.stem).stem if found.suffix == ".gz" else found.stem
    return found.absolute().name


def _from_parquet(path: Path, wanted: Wanted) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            kept = wanted.of(file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=kept):
                for row in _rows_of_batch(batch):
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}): copy it again") from None


def _from_folder(path: Path, wanted: Wanted) -> Table:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets and pyarrow raise what they like
        raise UserError(
            f"{path} is no folder of datasets' save_to_disk ({error}): of a folder of other files "
            f"name these, as in {path / '*.parquet'}"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        splits = ", ".join(str(path / split) for split in found)
        raise UserError(f"{path} holds several splits: name one of {splits}")
    return _rows_of(str(path), found, wanted)


def _from_hub(name: str, wanted: Wanted) -> Table:
    """Yield the rows of hf:owner/name[/config][:split], which `datasets` takes from its cache or
    from the network."""
    repository, _, split = name.removeprefix(HUB).partition(":")
    owner, _, rest = repository.partition("/")
    short, _, config = rest.partition("/")
    if not owner or not short:
        raise UserError(f"{name!r} is not of the form hf:owner/name[/config][:split]")
    import datasets

    try:
        found = datasets.load_dataset(
            f"{owner}/{short}", config or None, split=split or None, trust_remote_code=False
        )
    except Exception as error:  # the hub, the network and datasets raise what they like
        cause = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name} cannot be loaded ({type(error).__name__}: {cause}): it needs the network or "
            "datasets' cache; without either, give a file, or a folder that save_to_disk wrote"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if len(found) > 1:
            raise UserError(
                f"{name} holds several splits: name one of "
                f"{', '.join(f'{HUB}{repository}:{split}' for split in found)}"
            )
        found = next(iter(found.values()))
    return _rows_of(name, found, wanted)


def _rows_of(name: str, found: Any, wanted: Wanted) -> Table:
    rows = found.select_columns(wanted.of(found.column_names)).with_format("arrow")
    batches = map(_rows_of_batch, rows.iter(_BATCH_ROWS))
    numbered = enumerate(itertools.chain.from_iterable(batches), 1)
    return ((f"{name}, row {number}", row) for number, row in numbered)


def _rows_of_batch(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of an arrow table or batch, with `Number` for numbers that are not whole."""
    types = {field.name: field.type for field in batch.schema}
    for row in batch.to_pylist():
        yield {name: _with_text(value, types[name]) for name, value in row.items()}


def _with_text(value: Any, type_: Any) -> Any:
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        return {name: _with_text(inner, fields[name]) for name, inner in value.items()}
    if types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_):
        return [_with_text(inner, type_.value_type) for inner in value]
    if types.is_decimal(type_):
        return Number(format(value, "f"))
    if not types.is_floating(type_):
        return value
    return _text_of_float(type_.to_pandas_dtype()(value))


def _text_of_float(value: Any) -> Number:
    """Return the shortest decimal that a number of its type is read from."""
    if not numpy.isfinite(value):
        return Number({"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)])
    return Number(numpy.format_float_positional(value, trim="0"))

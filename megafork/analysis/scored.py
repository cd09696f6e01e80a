"""Scored responses as columns in memory: 4 bytes for a token's entropy, and 4 for its id if asked.

Parquet files are read by column, jsonl files line by line. Entropies are held as float32, which is
what `megafork score` computes; wider ones are rounded to it. Shapes: T tokens, B responses.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy

from megafork.errors import UserError
from megafork.system.parsing import parse_json

_BATCH_ROWS = 256
_ROUNDING = 1e-3
"""An entropy may be this far below 0, in nats; one below that is an error."""
_KEY = numpy.dtype("V16")

Encode = Callable[[str], list[int]]


class _Row(msgspec.Struct):
    """The fields of one response that are read; Raw is not decoded."""

    entropies: Sequence[float]
    response_ids: Sequence[int] | None = None
    prompt_ids: Sequence[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]] | None = None
    response: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


@dataclass(frozen=True)
class Scored:
    """Columns of one file's responses, one after the other."""

    path: Path
    entropy_T: numpy.ndarray
    """float32, nats"""
    id_T: numpy.ndarray | None
    """int32 token ids; None where they were not asked for"""
    length_B: numpy.ndarray
    """int64, tokens; may be 0"""
    number_B: numpy.ndarray
    """int64, the line of the file (in parquet the row), from 1"""
    key_B: numpy.ndarray
    """16 bytes that stand for the tokens of prompt and response"""

    @property
    def num_tokens(self) -> int:
        return len(self.entropy_T)

    def response_T(self) -> numpy.ndarray:
        """int32, the index of the response that a token belongs to."""
        return numpy.repeat(numpy.arange(len(self.length_B), dtype=numpy.int32), self.length_B)

    def place(self, index: int) -> str:
        """The file and the line (parquet: row) of a response, for messages."""
        return _place(self.path, self.number_B[index])


def read_scored(
    path: Path, *, vocab_size: int | None = None, encode: Encode | None = None
) -> Scored:
    """Read the parquet or jsonl file `path` that `megafork score` wrote.

    vocab_size: keeps the token ids, which must be below it. encode: tokenizes the responses that
    came as text. Raises UserError naming file and line for damaged JSON, missing entropies, an
    entropy that is NaN or negative, another number of entropies than of ids, or an id outside the
    vocabulary; and for a file without a token.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file that `megafork score` wrote")
    entropies, ids, keys = bytearray(), bytearray(), bytearray()
    numbers, lengths = array("q"), array("q")
    for number, row in (_parquet_rows if path.suffix == ".parquet" else _jsonl_rows)(path):
        where = _place(path, number)
        entropy_T = _entropies(row, where)
        id_T = _ids(row, where, encode, vocab_size)
        entropies += entropy_T.tobytes()
        if vocab_size is not None:
            ids += numpy.asarray(id_T, numpy.int32).tobytes()
        keys += _key(row)
        numbers.append(number)
        lengths.append(len(entropy_T))
    if not entropies:
        raise UserError(
            f"{path} holds no response token ({len(lengths)} responses): score a file that does"
        )
    return Scored(
        path,
        entropy_T=numpy.frombuffer(entropies, numpy.float32),
        id_T=None if vocab_size is None else numpy.frombuffer(ids, numpy.int32),
        length_B=numpy.frombuffer(lengths, numpy.int64),
        number_B=numpy.frombuffer(numbers, numpy.int64),
        key_B=numpy.frombuffer(keys, _KEY),
    )


def check_same_responses(a: Scored, b: Scored) -> None:
    """Raise UserError naming the first line at which two files differ in prompt or response."""
    advice = "score one file of responses with both models"
    if a.path.suffix != b.path.suffix:  # a jsonl of text has no ids, a parquet of the same has
        advice += ", into files of one format (.jsonl or .parquet)"
    common = min(len(a.key_B), len(b.key_B))
    differs = (a.key_B[:common] != b.key_B[:common]) | (a.length_B[:common] != b.length_B[:common])
    if differs.any():
        at = int(differs.argmax())
        raise UserError(f"{b.place(at)}: not the response of {a.place(at)}: {advice}")
    if len(a.key_B) != len(b.key_B):
        longer, shorter = (a, b) if len(a.key_B) > common else (b, a)
        raise UserError(
            f"{longer.place(common)}: {shorter.path} ends before this response "
            f"({common} of {len(longer.key_B)}): {advice}"
        )


def _place(path: Path, number: int) -> str:
    return f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {number}"


def _jsonl_rows(path: Path) -> Iterator[tuple[int, _Row]]:
    decode = msgspec.json.Decoder(_Row).decode
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = decode(line)
            except (msgspec.DecodeError, RecursionError) as error:
                raise UserError(f"{_place(path, number)}: {_fault(line, error)}") from None
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, _Row]]:
    import pyarrow
    from pyarrow import parquet

    integers = pyarrow.list_(pyarrow.int32())
    types = {
        "entropies": pyarrow.list_(pyarrow.float32()),
        "response_ids": integers,
        "prompt_ids": integers,
    }
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in types if name in file.schema_arrow.names]
            for name in ("entropies", "response_ids"):
                if name not in names:
                    raise UserError(f"{path}: no column {name!r}: score it with `megafork score`")
            for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                columns = [batch.column(name).cast(types[name]) for name in names]
                for values in zip(*columns, strict=True):
                    number += 1
                    for name, value in zip(names, values, strict=True):
                        if not value.is_valid or value.values.null_count:
                            raise UserError(f"{path}, row {number}: null in {name}: score it again")
                    arrays = (v.values.to_numpy(zero_copy_only=False) for v in values)
                    yield number, _Row(**dict(zip(names, arrays, strict=True)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}): copy it again") from None


def _entropies(row: _Row, where: str) -> numpy.ndarray:
    with numpy.errstate(over="ignore"):
        entropy_T = numpy.asarray(row.entropies, numpy.float32)
    wrong = ~numpy.isfinite(entropy_T) | (entropy_T < -_ROUNDING)
    if wrong.any():
        at = int(wrong.argmax())
        raise UserError(f"{where}: entropies[{at}] is {row.entropies[at]!s}, which is no entropy")
    return entropy_T


def _ids(
    row: _Row, where: str, encode: Encode | None, vocab_size: int | None
) -> numpy.ndarray | None:
    """The response's token ids, checked; None for text that is not tokenized."""
    ids = row.response_ids
    if ids is None and row.response and encode is not None:
        try:
            ids = encode(msgspec.json.decode(row.response, type=str))
        except msgspec.ValidationError:
            raise UserError(f"{where}: response must be a string") from None
    if ids is None and (vocab_size is not None or not row.response):
        raise UserError(f"{where}: neither response_ids nor response")
    if ids is None:
        return None
    if len(ids) != len(row.entropies):
        raise UserError(
            f"{where}: {len(row.entropies)} entropies for {len(ids)} response tokens: score the "
            "file again, or give the tokenizer that it was scored with"
        )
    id_T = numpy.asarray(ids)  # of objects, where one is beyond 64 bits
    if len(id_T) and not (id_T.min() >= 0 and id_T.max() < (vocab_size or 2**31)):
        raise UserError(
            f"{where}: response_ids go from {id_T.min()} to {id_T.max()}, outside the model's "
            f"vocabulary of {vocab_size or 2**31}: give the model that it was scored with"
        )
    return id_T


def _key(row: _Row) -> bytes:
    digest = hashlib.blake2b(digest_size=_KEY.itemsize)
    # The quotes of a text tell where the prompt ends; of ids the response's number, compared too.
    for ids, text in ((row.prompt_ids, row.prompt), (row.response_ids, row.response)):
        digest.update(_spelled(text) if ids is None else numpy.asarray(ids, numpy.int64).tobytes())
    return digest.digest()


def _spelled(text: msgspec.Raw) -> bytes:
    """JSON in one spelling, as an accent may be written as it is or as an escape."""
    return msgspec.json.encode(msgspec.json.decode(text), order="sorted") if text else b""


def _fault(line: bytes, error: Exception) -> str:
    """The reason why msgspec refused a line; Python's parser knows NaN and Infinity."""
    try:
        row: Any = parse_json(line)
    except ValueError as cause:
        return f"not JSON ({cause})"
    if not isinstance(row, dict):
        return "not an object"
    if "entropies" not in row:
        return "no column 'entropies': score it with `megafork score`"
    if isinstance(row["entropies"], list):
        for index, value in enumerate(row["entropies"]):
            if isinstance(value, float) and not abs(value) < float("inf"):
                return f"entropies[{index}] is {value}: the model or the scoring is broken there"
    return str(error)

"""Scored responses as columns: a file's JSON is read once, then blocks of numbers, any number of
times.

The columns go to a folder of the caller's, 8 bytes a token and 28 a response, so that memory does
not grow with the file and order statistics can be exact (order.py). Entropies are held as float32,
which is what `megafork score` writes; others are rounded to it.

Shapes: T tokens and B responses of one block.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy

from megafork.errors import UserError
from megafork.system.disk import naming
from megafork.system.parsing import parse_json

BLOCK_TOKENS = 1 << 20
_BLOCK_ROWS = 1 << 16
"""A block ends with the response that reaches either."""
_ROUNDING = 1e-3
"""An entropy may be this far below 0, in nats; beyond it is not one."""
_ROW = numpy.dtype([("line", "<i8"), ("length", "<i4"), ("key", "V16")])
_FILES = ("entropies", "ids", "rows")

Encode = Callable[[str], list[int]]


class _Line(msgspec.Struct):
    """What is read of a line; Raw is not decoded."""

    entropies: list[float]
    response_ids: list[int] | None = None
    prompt_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]] | None = None
    response: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


@dataclass(frozen=True)
class Block:
    """Whole responses, one after the other."""

    entropy_T: numpy.ndarray
    """float32, nats"""
    id_T: numpy.ndarray
    """int32 token ids; -1 throughout a response that came as text and was not tokenized"""
    length_B: numpy.ndarray
    """int32, tokens; may be 0"""
    first_row: int
    """number of the first response in its file, from 0"""

    @property
    def row_T(self) -> numpy.ndarray:
        """int64, which of the file's responses a token is of, from 0"""
        rows_B = numpy.arange(self.first_row, self.first_row + len(self.length_B))
        return numpy.repeat(rows_B, self.length_B)


class Columns:
    """The columns of one file. Two files with the same responses have the same blocks."""

    def __init__(self, path: Path, folder: Path, blocks: list[tuple[int, int]]) -> None:
        """blocks: (responses, tokens) of each."""
        self.path, self._folder, self._blocks = path, folder, blocks
        self.num_rows = sum(rows for rows, _ in blocks)
        self.num_tokens = sum(tokens for _, tokens in blocks)

    def blocks(self) -> Iterator[Block]:
        """All blocks, in the file's order."""
        with contextlib.ExitStack() as stack:
            entropies, ids, rows = (
                stack.enter_context((self._folder / name).open("rb")) for name in _FILES
            )
            first_row = 0
            for num_rows, num_tokens in self._blocks:
                yield Block(
                    numpy.fromfile(entropies, numpy.float32, num_tokens),
                    numpy.fromfile(ids, numpy.int32, num_tokens),
                    numpy.fromfile(rows, _ROW, num_rows)["length"],
                    first_row,
                )
                first_row += num_rows

    def entropies(self) -> Iterator[numpy.ndarray]:
        """float32, block by block."""
        with (self._folder / "entropies").open("rb") as file:
            for _, num_tokens in self._blocks:
                yield numpy.fromfile(file, numpy.float32, num_tokens)

    def records(self) -> Iterator[numpy.ndarray]:
        """(line, length, key) of every response, block by block; the key stands for its tokens and
        its prompt's."""
        with (self._folder / "rows").open("rb") as file:
            for num_rows, _ in self._blocks:
                yield numpy.fromfile(file, _ROW, num_rows)


def read_scored(
    path: Path,
    folder: Path,
    *,
    encode: Encode | None = None,
    vocab_size: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> Columns:
    """Read the jsonl `path` of `megafork score` into `folder`, which is made.

    encode: tokenizes the responses that came as text, for analyses that ask for ids; vocab_size:
    ids must be below it. Raises UserError naming file and line: no JSON, no entropies, one that is
    NaN or none, another number of them than of ids, an id that the vocabulary lacks; no token.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file that `megafork score` wrote")
    folder.mkdir()
    blocks: list[tuple[int, int]] = []
    decode = msgspec.json.Decoder(_Line).decode
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(path.open("rb"))
        stack.enter_context(naming(folder))
        spool = _Spool([stack.enter_context((folder / name).open("wb")) for name in _FILES])
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = decode(line)
            except (msgspec.DecodeError, RecursionError) as error:
                raise UserError(f"{where}: {_fault(line, error)}") from None
            entropy_T = _entropies(row, where)
            id_T = _ids(row, where, encode, vocab_size)
            spool.add(number, entropy_T, id_T, _key(row))
            if spool.num_tokens >= block_tokens or spool.num_rows >= _BLOCK_ROWS:
                blocks.append(spool.write())
        if spool.num_rows:
            blocks.append(spool.write())
    columns = Columns(path, folder, blocks)
    if not columns.num_tokens:
        raise UserError(
            f"{path} holds no response token ({columns.num_rows} responses): score a file that does"
        )
    return columns


def check_same_responses(a: Columns, b: Columns) -> None:
    """Raise UserError naming the first line at which two files differ in prompt or response."""
    empty = numpy.empty(0, _ROW)
    # Blocks end by length alone, so those before the first difference are of the same responses.
    for ours, theirs in zip_longest(a.records(), b.records(), fillvalue=empty):
        common = min(len(ours), len(theirs))
        differs = (ours["key"][:common] != theirs["key"][:common]) | (
            ours["length"][:common] != theirs["length"][:common]
        )
        if differs.any():
            at = int(differs.argmax())
            raise UserError(
                f"{b.path}, line {theirs['line'][at]}: not the response of {a.path}, line "
                f"{ours['line'][at]}: score one file of responses with both models"
            )
        if len(ours) != len(theirs):
            longer, shorter = (a, b) if len(ours) > common else (b, a)
            line = (ours if len(ours) > common else theirs)["line"][common]
            raise UserError(
                f"{longer.path}, line {line}: {shorter.path} ends before this response "
                f"({shorter.num_rows} of {longer.num_rows}): score one file of responses with "
                "both models"
            )


class _Spool:
    """Gathers one block and writes it."""

    def __init__(self, files: list[BinaryIO]) -> None:
        self._files = files
        self._clear()

    def _clear(self) -> None:
        self.num_rows = self.num_tokens = 0
        self._columns: tuple[list, list, list] = ([], [], [])

    def add(self, line: int, entropy_T: numpy.ndarray, id_T: numpy.ndarray, key: bytes) -> None:
        row = numpy.array([(line, len(entropy_T), key)], _ROW)
        for column, values in zip(self._columns, (entropy_T, id_T, row), strict=True):
            column.append(values)
        self.num_rows += 1
        self.num_tokens += len(entropy_T)

    def write(self) -> tuple[int, int]:
        """(responses, tokens) of the block"""
        for file, column in zip(self._files, self._columns, strict=True):
            numpy.concatenate(column).tofile(file)
        size = (self.num_rows, self.num_tokens)
        self._clear()
        return size


def _entropies(row: _Line, where: str) -> numpy.ndarray:
    with numpy.errstate(over="ignore"):
        entropy_T = numpy.array(row.entropies, numpy.float32)
    wrong = ~numpy.isfinite(entropy_T) | (entropy_T < -_ROUNDING)
    if wrong.any():
        at = int(wrong.argmax())
        raise UserError(f"{where}: entropies[{at}] is {row.entropies[at]}, which is no entropy")
    return entropy_T


def _ids(row: _Line, where: str, encode: Encode | None, vocab_size: int | None) -> numpy.ndarray:
    ids = row.response_ids
    if ids is None and row.response and encode is not None:
        try:
            ids = encode(msgspec.json.decode(row.response, type=str))
        except msgspec.ValidationError:
            raise UserError(f"{where}: response must be a string") from None
    if ids is None and (encode is not None or not row.response):
        raise UserError(f"{where}: neither response_ids nor response")
    if ids is None:
        return numpy.full(len(row.entropies), -1, numpy.int32)
    if len(ids) != len(row.entropies):
        raise UserError(
            f"{where}: {len(row.entropies)} entropies for {len(ids)} response tokens: score the "
            "file again, or give the tokenizer that it was scored with"
        )
    if ids and not (min(ids) >= 0 and max(ids) < (vocab_size or 2**31)):
        raise UserError(
            f"{where}: response_ids go from {min(ids)} to {max(ids)}, outside the model's "
            f"vocabulary of {vocab_size or 2**31}: give the model that it was scored with"
        )
    return numpy.array(ids, numpy.int32)


def _key(row: _Line) -> bytes:
    digest = hashlib.blake2b(digest_size=_ROW["key"].itemsize)
    # Where the prompt ends is told by the quotes of a text, and by the tokens' number, which is
    # compared as well.
    for ids, text in ((row.prompt_ids, row.prompt), (row.response_ids, row.response)):
        digest.update(_spelled(text) if ids is None else numpy.array(ids, numpy.int64).tobytes())
    return digest.digest()


def _spelled(text: msgspec.Raw) -> bytes:
    """JSON in one spelling: an accent may be written as it is or as an escape."""
    return msgspec.json.encode(msgspec.json.decode(text), order="sorted") if text else b""


def _fault(line: bytes, error: Exception) -> str:
    """What is wrong with a line that msgspec refused; Python's parser knows NaN and Infinity."""
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

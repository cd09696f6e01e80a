"""Prompts for training and evaluation: checked rows, tokenized; for training an endless stream."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafork.config import PromptConfig
from megafork.config.rollouts import PLACEHOLDER, DataConfig
from megafork.data.tables import Number, look_up, read_table, read_with
from megafork.data.tokenizer import Tokenizer, Turns
from megafork.errors import UserError

Encode = Callable[[str | Turns], list[int]]
_SHOWN = 1500
"""Characters of a prompt's beginning and of its end that are shown"""


@dataclass(frozen=True)
class Row:
    where: str
    """File and row, for messages"""
    id: str
    prompt: str | Turns
    answer: str

    @property
    def text(self) -> str:
        """The prompt as the verifier is given it: a chat's is the text of its last turn."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass(frozen=True)
class Prompt:
    index: int
    """Position in the stream (train) or in the file (held-out, benchmarks)."""
    text: str
    answer: str
    ids: list[int]
    id: str = ""
    """A benchmark's own name for the problem"""


def read_rows(path: str | Path, data: PromptConfig, id_key: str = "") -> list[Row]:
    """Read the rows of a data file (data/tables.py). Raises UserError naming file, row and fault.

    id_key: the column that tells rows apart; empty: their number does. An empty data.answer_key
    leaves the answers empty.
    """
    keys = [key for key in (id_key, data.prompt_key, data.answer_key) if key]
    rows: list[Row] = []
    first: dict[str, str] = {}
    table = read_table(path, keys) if data.reader is None else read_with(data.reader, path)
    for where, raw in table:
        id_ = _read_id(raw, id_key, where) if id_key else str(len(rows) + 1)
        if id_ in first:
            raise UserError(
                f"{where}: id {id_!r} is that of {first[id_]} too: ids must tell the problems "
                "apart; give them others, or set data.id_key= (empty) for the numbers of the rows"
            )
        first[id_] = where
        prompt = _read_prompt(raw, data, where)
        answer = _read_answer(raw, data.answer_key, where) if data.answer_key else ""
        row = Row(where, id_, prompt, answer)
        _check_characters(row)
        rows.append(row)
    if not rows:
        raise UserError(f"data file {path} is empty")
    return rows


def read_both(data: DataConfig) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the held-out ones; there are none where data.eval is
    unset."""
    return read_rows(data.train, data), read_rows(data.eval, data) if data.eval is not None else []


def _check_characters(row: Row) -> None:
    turns = [row.prompt] if isinstance(row.prompt, str) else [t["content"] for t in row.prompt]
    for text in (row.id, *turns, row.answer):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{row.where}: {text[:60]!r} holds half of a surrogate pair, which is no character "
                f"({error.reason}): mend the row"
            ) from None


def _column(raw: Any, key: str, setting: str, where: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: no column {key!r}, the row is not an object")
    try:
        return look_up(raw, key)
    except KeyError:
        columns = ", ".join(map(repr, raw)) or "none"
        raise UserError(f"{where}: no column {key!r} (it has {columns}): set {setting}") from None


def _read_id(raw: Any, key: str, where: str) -> str:
    value = _column(raw, key, "data.id_key (empty: the number of the row)", where)
    is_fraction = isinstance(value, Number) and not value.lstrip("-").isdigit()
    if not isinstance(value, str | int) or value == "" or is_fraction:
        raise UserError(f"{where}: {key!r} must be a non-empty string or a whole number")
    return str(value)


def _read_prompt(raw: Any, data: PromptConfig, where: str) -> str | Turns:
    key = data.prompt_key
    value = _column(raw, key, "data.prompt_key", where)
    if isinstance(value, list):
        return _read_turns(value, data, f"{where}: {key!r}")
    if not isinstance(value, str) or isinstance(value, Number) or not value.strip():
        raise UserError(f"{where}: {key!r} must be a non-empty string, or a list of chat turns")
    return value


def _read_turns(value: list[Any], data: PromptConfig, what: str) -> Turns:
    turns = [
        {name: turn[name] for name in ("role", "content")}
        for turn in value
        if isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    ]
    if not value or len(turns) != len(value):
        raise UserError(f"{what} is a list, but not of {{role, content}} turns with text in both")
    if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise UserError(f"{what} must end with a user's turn that is not empty")
    if not data.chat_template:
        raise UserError(
            f"{what} is a list of chat turns, which need the tokenizer's chat template: set "
            "data.chat_template=true"
        )
    if data.template is not None:
        raise UserError(
            f"{what} is a list of whole chat turns, but data.template puts text around a problem: "
            "leave data.template unset"
        )
    return turns


def _read_answer(raw: Any, key: str, where: str) -> str:
    """Return the answer as text; a list of one is its item (OlympiadBench), other lists and objects
    are JSON.

    Raises UserError for an answer that is empty, null, NaN, infinite, a boolean or no text.
    """
    value = _column(raw, key, "data.answer_key", where)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    what = f"{where}: {key!r}"
    if isinstance(value, bytes):
        raise UserError(f"{what} is bytes, no text: store it as a string")
    if isinstance(value, list | dict):
        return _written(value, what)
    _check_answer(value, what)
    return str(value)


def _written(value: Any, what: str) -> str:
    """Return the value as JSON, in which numbers keep their text."""
    if isinstance(value, dict) and value:
        pairs = (
            f"{json.dumps(k, ensure_ascii=False)}: {_written(v, what)}" for k, v in value.items()
        )
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list) and value:
        return f"[{', '.join(_written(inner, what) for inner in value)}]"
    _check_answer(value, what)
    try:
        return value if isinstance(value, Number) else json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # a table's bytes, dates
        raise UserError(f"{what} cannot be written as JSON ({error})") from None


def _check_answer(value: Any, what: str) -> None:
    fault = None
    if value is None:
        fault = "is null"
    elif isinstance(value, bool):
        fault = f"is {str(value).lower()}, a boolean"
    elif isinstance(value, Number) and value.lstrip("-") in ("NaN", "Infinity"):
        fault = f"is {value}, no number"
    elif value in ([], {}) or (isinstance(value, str) and not value.strip()):
        fault = "is empty"
    if fault is not None:
        raise UserError(
            f"{what} {fault}: every row needs an answer as text or a number; mend or remove the row"
        )


def read_prompts(
    path: str | Path, data: PromptConfig, encode: Encode, id_key: str = ""
) -> list[Prompt]:
    """Read and tokenize all rows, so that a prompt that is too long is told now, not hours into the
    run."""
    return encode_rows(read_rows(path, data, id_key), data, encode)


def encode_rows(rows: Sequence[Row], data: PromptConfig, encode: Encode) -> list[Prompt]:
    prompts = []
    for index, row in enumerate(rows):
        asked = row.prompt
        if data.template is not None and isinstance(asked, str):
            asked = data.template.replace(PLACEHOLDER, asked)
        ids = encode(asked)
        if not 0 < len(ids) <= data.max_prompt_tokens:
            raise UserError(
                f"{row.where}: the prompt ({row.text[:60]!r}) has {len(ids)} tokens, "
                f"data.max_prompt_tokens={data.max_prompt_tokens}: raise it or remove the row"
            )
        prompts.append(Prompt(index, row.text, row.answer, ids, row.id))
    return prompts


def lines_of(prompt: Prompt, tokenizer: Tokenizer) -> list[str]:
    """The prompt as the model reads it, its special tokens included, for the user to look at.

    Control characters are written as Python writes them, all but the ends of lines; the middle of a
    long prompt is left out.
    """
    text = tokenizer.show(prompt.ids)
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]}\n[{len(text) - 2 * _SHOWN} characters]\n{text[-_SHOWN:]}"
    lines = text.split("\n")
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
    return [f"{len(prompt.ids)} tokens", *(f"| {line}" for line in shown)]


class PromptStream:
    """Training prompts in a seeded order, new in every epoch, without end.

    Prompt i of the stream is a function of (prompts, seed, i), so a position is all that a resumed
    run needs.
    """

    def __init__(self, prompts: list[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.position = 0
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, with their position in the stream as index."""
        taken = [self.at(self.position + i) for i in range(count)]
        self.position += count
        return taken

    def at(self, index: int) -> Prompt:
        epoch, offset = divmod(index, len(self.prompts))
        if epoch != self._epoch:
            self._order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return replace(self.prompts[self._order[offset]], index=index)

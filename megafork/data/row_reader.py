"""Checked rows: prompt, answer, id and further columns, from whatever columns a file has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megafork.config import PromptConfig
from megafork.data.columns import (
    ANSWERS,
    IDS,
    PROMPTS,
    Further,
    Wanted,
    choose,
    has,
    listed,
    look_up,
)
from megafork.data.text_files import Number
from megafork.data.tokenizer import Turns
from megafork.errors import UserError
from megafork.system.parsing import parse_json

_TURN = ("role", "content")


@dataclass(frozen=True)
class Row:
    where: str
    """File and row, for messages"""
    id: str
    prompt: str | Turns
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns, for verifiers that take them"""

    @property
    def text(self) -> str:
        """The prompt as the verifier is given it: a chat's is the text of its last turn."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


class RowReader:
    """Reads one file's rows; its first row decides the columns that settings leave open.

    id_key: as in `read_rows` (prompts.py). further: columns that verifiers take.
    """

    def __init__(self, data: PromptConfig, id_key: str | None, further: Further) -> None:
        self._data, self._further = data, further
        self.prompt_key, self.answer_key, self.id_key = data.prompt_key, data.answer_key, id_key
        """Columns; None until the first row is read"""
        self._finds_id = id_key is None

    @property
    def wanted(self) -> Wanted:
        """The columns to read of a table."""
        choices = (
            _names(self._data.prompt_key, PROMPTS),
            _names(self._data.answer_key, ANSWERS),
            _names(self.id_key or "", ()),
            *((name,) for name in self._further.required),
        )
        also = self._further.optional.union(IDS if self._finds_id else ())
        needed = tuple(names for names in choices if names)
        return Wanted(needed, also, self._further.takes_all)

    def read(self, raw: Any, where: str, *, number: int) -> Row:
        """Check a row and return it. Raises UserError naming the row and its fault.

        number: its id where no column is one.
        """
        if self.prompt_key is None:
            self.prompt_key = choose(raw, PROMPTS, "data.prompt_key", where)
        if self.answer_key is None:
            self.answer_key = choose(raw, ANSWERS, "data.answer_key", where)
        if self.id_key is None:
            self.id_key = next((key for key in IDS if isinstance(raw, dict) and has(raw, key)), "")
        id_ = self._read_id(raw, where) or str(number)
        prompt = self._read_prompt(raw, self.prompt_key, where)
        answer = _read_answer(raw, self.answer_key, where) if self.answer_key else ""
        row = Row(where, id_, prompt, answer, self._read_further(raw, prompt, where))
        _check_characters(row)
        return row

    def _read_id(self, raw: Any, where: str) -> str:
        """Return the row's id, "" where its number is to be that."""
        if not self.id_key or (self._finds_id and not has(raw, self.id_key)):
            return ""
        value = _column(raw, self.id_key, "data.id_key (empty: the number of the row)", where)
        is_fraction = isinstance(value, Number) and not value.lstrip("-").isdigit()
        if isinstance(value, str | int) and value != "" and not is_fraction:
            return str(value)
        if self._finds_id:
            return ""
        raise UserError(f"{where}: {self.id_key!r} must be a non-empty string or a whole number")

    def _read_prompt(self, raw: Any, key: str, where: str) -> str | Turns:
        value = _column(raw, key, "data.prompt_key", where)
        if isinstance(value, str) and not isinstance(value, Number):
            value = turns_in(value)
        if isinstance(value, list):
            return _read_turns(value, self._data, f"{where}: {key!r}")
        if not isinstance(value, str) or isinstance(value, Number) or not value.strip():
            raise UserError(f"{where}: {key!r} must be a non-empty string, or a list of chat turns")
        return value

    def _read_further(self, raw: Any, prompt: str | Turns, where: str) -> dict[str, Any]:
        """Return the columns that verifiers take; of a chat its turns are the column prompt."""
        further = self._further
        found = {}
        for name in raw if further.takes_all else further.required | further.optional:
            if name == "prompt":
                if not isinstance(prompt, str):
                    found[name] = prompt
            elif name in raw:
                try:
                    found[name] = _plain(raw[name])
                except TypeError as error:
                    if name in further.required:
                        raise UserError(
                            f"{where}: {name!r}, which the verifier takes, is no text, number or "
                            f"list ({error}): store it as one"
                        ) from None
            elif name in further.required:
                raise UserError(
                    f"{where}: no column {name!r} (it has {listed(raw)}), which the verifier "
                    "takes: give its parameter a default, or add the column"
                )
        return found


def _names(key: str | None, known: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the names that a column may have: the setting's, or the known ones."""
    if key is None:
        return tuple(name for names in known for name in names)
    return (key,) if key else ()


def _column(raw: Any, key: str, setting: str, where: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{where}: no column {key!r}, the row is not an object")
    try:
        return look_up(raw, key)
    except KeyError:
        raise UserError(
            f"{where}: no column {key!r} (it has {listed(raw)}): set {setting}"
        ) from None


def turns_in(text: str) -> Any:
    """Return the chat turns of a text that is a JSON list of them, any other text as it is."""
    if not text.lstrip().startswith("["):
        return text
    try:
        value = parse_json(text)
    except ValueError:
        return text
    has_turns = all(isinstance(turn, dict) and set(_TURN) <= set(turn) for turn in value)
    return value if value and has_turns else text


def _read_turns(value: list[Any], data: PromptConfig, what: str) -> Turns:
    turns = [
        {name: turn[name] for name in _TURN}
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


def _plain(value: Any) -> Any:
    """Return a column's value as JSON can hold it, with numbers for their text.

    Raises TypeError for what JSON cannot hold.
    """
    if isinstance(value, Number):
        return int(value) if value.lstrip("-").isdigit() and len(value) < 100 else float(value)
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"it is {type(value).__name__}")

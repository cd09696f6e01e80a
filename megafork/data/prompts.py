"""Prompts for training and evaluation: checked rows, tokenized; for training an endless stream."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megafork.config import PromptConfig
from megafork.config.rollouts import PLACEHOLDER, DataConfig
from megafork.data.columns import NO_FURTHER, Further
from megafork.data.row_reader import Row, RowReader
from megafork.data.tables import files_of, read_table, read_with
from megafork.data.tokenizer import Tokenizer, Turns
from megafork.errors import UserError

Encode = Callable[[str | Turns], list[int]]
Tell = Callable[[str], object]
_SHOWN = 1500
"""Characters of a prompt's beginning and of its end that are shown"""


@dataclass(frozen=True)
class Prompt:
    index: int
    """Position in the stream (train) or in the file (held-out, benchmarks)."""
    text: str
    answer: str
    ids: list[int]
    id: str = ""
    """A benchmark's own name for the problem"""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns of the row, for verifiers that take them"""


Data = str | Path | Sequence[str]
"""A data file, a pattern that fits several, or a list of these"""


def read_rows(
    given: Data,
    data: PromptConfig,
    id_key: str | None = "",
    further: Further = NO_FURTHER,
    tell: Tell | None = None,
) -> list[Row]:
    """Read the rows of data files (data/tables.py). Raises UserError naming file, row and fault.

    id_key: the column that tells rows apart; empty: their number does; None: a column of a known
    name, or their number. An empty data.answer_key leaves the answers empty. further: columns for
    verifiers. tell: called with what was made of ids that occur more than once.
    """
    rows: list[Row] = []
    for path in files_of(given):
        reader = RowReader(data, id_key, further)
        before = len(rows)
        table = (
            read_table(path, reader.wanted) if data.reader is None else read_with(data.reader, path)
        )
        for where, raw in table:
            rows.append(reader.read(raw, where, number=len(rows) + 1))
        if len(rows) == before:
            raise UserError(f"data file {path} is empty")
    return _with_distinct_ids(rows, tell)


def _with_distinct_ids(rows: list[Row], tell: Tell | None) -> list[Row]:
    """Return the rows with #2, #3 and so on after an id that an earlier row has already."""
    taken: set[str] = set()
    counts: dict[str, int] = {}
    repeated: list[Row] = []
    distinct: list[Row] = []
    for row in rows:
        name = row.id
        while name in taken:
            counts[row.id] = counts.get(row.id, 1) + 1
            name = f"{row.id}#{counts[row.id]}"
        taken.add(name)
        if name != row.id:
            repeated.append(row)
            row = replace(row, id=name)
        distinct.append(row)
    if repeated and tell is not None:
        tell(
            f"note: {repeated[0].where}: id {repeated[0].id!r} is that of an earlier row, as it is "
            f"of {len(repeated)} of {len(rows)} rows; the later ones are called "
            f"{repeated[0].id}#2 and so on"
        )
    return distinct


def read_both(data: DataConfig, further: Further = NO_FURTHER) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the held-out ones; there are none where data.eval is
    unset."""
    held_out = read_rows(data.eval, data, "", further) if data.eval is not None else []
    return read_rows(data.train, data, "", further), held_out


def read_prompts(
    given: Data,
    data: PromptConfig,
    encode: Encode,
    id_key: str | None = "",
    further: Further = NO_FURTHER,
    tell: Tell | None = None,
) -> list[Prompt]:
    """Read and tokenize all rows, so that a prompt that is too long is told now, not hours into the
    run."""
    return encode_rows(read_rows(given, data, id_key, further, tell), data, encode, tell)[1]


def encode_rows(
    rows: Sequence[Row], data: PromptConfig, encode: Encode, tell: Tell | None = None
) -> tuple[list[Row], list[Prompt]]:
    """Tokenize the rows. Returns those that are kept and their prompts.

    Raises UserError for a prompt that is longer than data.max_prompt_tokens, or, with
    data.too_long=drop, where no row is left. tell: called with the number of rows that were left
    out.
    """
    kept: list[Row] = []
    prompts: list[Prompt] = []
    for row in rows:
        ids = encode(asked_of(row, data))
        if (fault := length_fault(row, len(ids), data)) is None:
            prompts.append(Prompt(len(kept), row.text, row.answer, ids, row.id, row.columns))
            kept.append(row)
        elif data.too_long == "error" or not ids:
            raise UserError(fault)
    dropped = len(rows) - len(kept)
    if rows and not kept:
        raise UserError(
            f"data.too_long=drop leaves none of {len(rows)} rows: all prompts have more than "
            f"data.max_prompt_tokens={data.max_prompt_tokens} tokens; raise it"
        )
    if dropped and tell is not None:
        tell(
            f"note: {dropped} of {len(rows)} rows are left out, since their prompts have more than "
            f"data.max_prompt_tokens={data.max_prompt_tokens} tokens (data.too_long=drop)"
        )
    return kept, prompts


def asked_of(row: Row, data: PromptConfig) -> str | Turns:
    """Return what the model is asked: the prompt in data.template."""
    if data.template is None or not isinstance(row.prompt, str):
        return row.prompt
    return data.template.replace(PLACEHOLDER, row.prompt)


def length_fault(row: Row, num_tokens: int, data: PromptConfig) -> str | None:
    """Return why a prompt of so many tokens cannot be used, None where it can."""
    if 0 < num_tokens <= data.max_prompt_tokens:
        return None
    fix = (
        "raise it, or set data.too_long=drop to leave such rows out"
        if num_tokens
        else "remove the row"
    )
    return (
        f"{row.where}: the prompt ({row.text[:60]!r}) has {num_tokens} tokens, "
        f"data.max_prompt_tokens={data.max_prompt_tokens}: {fix}"
    )


def lines_of(prompt: Prompt, tokenizer: Tokenizer) -> list[str]:
    """The prompt as the model reads it, its special tokens included, for the user to look at.

    Control characters are written as Python writes them, all but the ends of lines; the middle of a
    long prompt is left out.
    """
    return [f"{len(prompt.ids)} tokens", *text_lines(tokenizer.show(prompt.ids))]


def text_lines(text: str) -> list[str]:
    """A text for a terminal, as `lines_of` shows a prompt."""
    if len(text) > 2 * _SHOWN:
        text = f"{text[:_SHOWN]}\n[{len(text) - 2 * _SHOWN} characters]\n{text[-_SHOWN:]}"
    lines = text.split("\n")
    shown = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
    return [f"| {line}" for line in shown]


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

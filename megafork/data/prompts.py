"""Training prompts: jsonl rows, tokenized, as an endless stream with a position."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megafork.config import DataConfig
from megafork.errors import UserError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    index: int
    """Position in the stream (train) or in the file (held-out)."""
    text: str
    answer: str
    ids: list[int]


def read_rows(path: str | Path, data: DataConfig) -> list[tuple[str, str]]:
    """(prompt, answer) of every line. Raises UserError that names the file, line and fault."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist")
    rows = []
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_parse(line, f"{path}, line {number}", data))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from None
    if not rows:
        raise UserError(f"data file {path} is empty")
    return rows


def _parse(line: str, where: str, data: DataConfig) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    for key in (data.prompt_key, data.answer_key):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{where}: no column {key!r}; set data.prompt_key and data.answer_key")
    if not isinstance(row[data.prompt_key], str) or not row[data.prompt_key]:
        raise UserError(f"{where}: {data.prompt_key!r} must be a non-empty string")
    return row[data.prompt_key], str(row[data.answer_key])


def read_prompts(path: str | Path, data: DataConfig, encode: Encode) -> list[Prompt]:
    """All rows, tokenized: a prompt that is too long is told now, not hours into the run."""
    prompts = []
    for index, (text, answer) in enumerate(read_rows(path, data)):
        ids = encode(text)
        if not 0 < len(ids) <= data.max_prompt_tokens:
            raise UserError(
                f"{path}: prompt {index + 1} ({text[:60]!r}) has {len(ids)} tokens, "
                f"data.max_prompt_tokens={data.max_prompt_tokens}: raise it or remove the row"
            )
        prompts.append(Prompt(index, text, answer, ids))
    return prompts


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

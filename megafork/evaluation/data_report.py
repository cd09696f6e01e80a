"""`megafork data check`: what a data file holds, and which of its rows a run would refuse."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megafork.answers.comparison import bare
from megafork.answers.formulas import Unreadable
from megafork.answers.places import BOXED, gold_answer
from megafork.answers.reader import read
from megafork.config import GenerateConfig, RewardConfig
from megafork.data.prompts import Prompt, asked_of, length_fault, lines_of, text_lines
from megafork.data.row_reader import Row, RowReader
from megafork.data.tables import files_of, read_table, read_with
from megafork.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from megafork.errors import UserError
from megafork.evaluation.source import find_model
from megafork.verifiers import countdown
from megafork.verifiers.names import check_answers, check_verifiers, columns_of

Tell = Callable[[str], object]
_MOST_FAULTS = 20
"""Faulty rows of a file that are told one by one"""
_LONGEST_EXACT = 40
"""Characters of an answer that a model can be asked to give letter by letter"""


@dataclass
class _Found:
    """The rows of one file."""

    names: list[str] = field(default_factory=list)
    """All columns of the first row"""
    keys: tuple[str, str, str] = ("", "", "")
    """Columns of prompt, answer and id; an empty one: the row's number"""
    rows: list[Row] = field(default_factory=list)
    count: int = 0
    faults: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    """Tokens of the rows' prompts; empty without a tokenizer"""
    dropped: int = 0
    """Rows whose prompts are too long, where data.too_long=drop"""


def check_data(
    config: GenerateConfig, data: Sequence[str], verifiers: Sequence[str], tell: Tell
) -> None:
    """Tell columns, number of rows, lengths, the first prompt and the faults of each file, and
    which verifiers fit.

    config: an empty model.path leaves out what takes a tokenizer. verifiers: those that are to
    judge, whose columns the rows must have. Raises UserError at the end where rows cannot be used.
    """
    config.data.check(needs_answers=False)
    check_verifiers(verifiers)
    tokenizer = _tokenizer_of(config) if config.model.path else None
    faulty, count = 0, 0
    for path in files_of(data):
        found = _read(config, path, verifiers)
        if tokenizer is not None:
            _encode(config, found, tokenizer)
        for line in (
            *_lines(path, found),
            *_prompt_lines(config, found, tokenizer),
            *_fault_lines(found.faults),
        ):
            tell(line)
        faulty += len(found.faults)
        count += found.count
    if faulty:
        raise UserError(f"{faulty} of {count} rows cannot be used: mend or remove them")


def _tokenizer_of(config: GenerateConfig) -> Tokenizer:
    side = find_model(config.model.path)
    model = config.model.model_copy(update={"path": str(side.side)})
    config = config.model_copy(update={"model": model})
    chat, thinking = config.data.chat_template, config.data.enable_thinking
    check_tokenizer(config, side.shape().vocab_size, chat_template=chat)
    return load_tokenizer(config, chat_template=chat, enable_thinking=thinking)


def _read(config: GenerateConfig, path: str, verifiers: Sequence[str]) -> _Found:
    """Read every row that can be read; a fault of the file itself ends it."""
    data, found = config.data, _Found()
    reader = RowReader(data, data.id_key, columns_of(verifiers))
    everything = replace(reader.wanted, everything=True)
    reward = RewardConfig(verifier=list(verifiers) or "exact")
    rows = read_table(path, everything) if data.reader is None else read_with(data.reader, path)
    try:
        for where, raw in rows:
            found.count += 1
            if not found.names and isinstance(raw, dict):
                found.names = list(raw)
            try:
                row = reader.read(raw, where, number=found.count)
                check_answers([row], reward)
                found.rows.append(row)
            except UserError as error:
                if None in (reader.prompt_key, reader.answer_key):  # no row could be read then
                    raise
                found.faults.append(str(error))
    except UserError as error:
        if not found.rows:
            raise
        found.count += 1
        found.faults.append(f"{error}; the rows after it were not read")
    if not found.count:
        raise UserError(f"data file {path} is empty")
    found.keys = reader.prompt_key or "", reader.answer_key or "", reader.id_key or ""
    return found


def _encode(config: GenerateConfig, found: _Found, tokenizer: Tokenizer) -> None:
    """Tokenize the prompts; those that are too long are faults, or counted where they are left
    out."""
    for row in found.rows:
        found.ids.append(tokenizer.encode_prompt(asked_of(row, config.data)))
        fault = length_fault(row, len(found.ids[-1]), config.data)
        if fault is not None and config.data.too_long == "drop":
            found.dropped += 1
        elif fault is not None:
            found.faults.append(fault)


def _lines(path: str, found: _Found) -> Iterator[str]:
    """Yield what is told of a file's columns, lengths and verifiers."""
    prompt_key, answer_key, id_key = found.keys
    used = {key.split(".")[0] for key in found.keys} | set(found.keys)
    yield f"{path}: {found.count} rows"
    yield f"  prompt    {prompt_key}{_spread([len(row.text) for row in found.rows], 'characters')}"
    if answer_key:
        lengths = [len(row.answer) for row in found.rows]
        yield f"  answer    {answer_key}{_spread(lengths, 'characters')}"
    repeated = len(found.rows) - len({row.id for row in found.rows})
    note = f"; {repeated} rows have an id of an earlier one" if repeated else ""
    yield f"  id        {id_key or 'the number of the row'}{note}"
    yield f"  others    {', '.join(name for name in found.names if name not in used) or 'none'}"
    if found.ids:
        lengths = [len(ids) for ids in found.ids]
        note = f"; {found.dropped} are too long and left out" if found.dropped else ""
        yield f"  tokens    of prompts{_spread(lengths, 'tokens')}{note}"
    if answer_key:
        yield from _verifier_lines(found.rows)


def _prompt_lines(
    config: GenerateConfig, found: _Found, tokenizer: Tokenizer | None
) -> Iterator[str]:
    """Yield the first prompt: as the model reads it where there is a tokenizer."""
    if not found.rows:
        return
    if tokenizer is not None:
        first, *rest = lines_of(Prompt(0, "", "", found.ids[0]), tokenizer)
    else:
        asked = asked_of(found.rows[0], config.data)
        turns = [] if isinstance(asked, str) else [f"{t['role']}: {t['content']}" for t in asked]
        first = "give --model to see it as the model reads it"
        rest = text_lines("\n".join(turns) if turns else str(asked))
    yield f"  first prompt: {first}"
    yield from (f"  {line}" for line in rest)


def _fault_lines(faults: Sequence[str]) -> Iterator[str]:
    if faults:
        yield f"  {len(faults)} rows cannot be used:"
        yield from (f"    {fault}" for fault in faults[:_MOST_FAULTS])
    if len(faults) > _MOST_FAULTS:
        yield f"    and {len(faults) - _MOST_FAULTS} more"


def _spread(values: Sequence[int], unit: str) -> str:
    if not values:
        return ""
    middle = statistics.median_low(values)
    return f", {min(values)} to {max(values)} {unit}, {middle} in the middle"


def _verifier_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how many rows each built-in verifier can judge."""
    maths, short, puzzles = 0, 0, 0
    for row in rows:
        answer = bare(gold_answer(row.answer, BOXED))
        maths += _is_read(answer)
        short += len(row.answer) <= _LONGEST_EXACT and "\n" not in row.answer
        puzzles += _is_puzzle(row)
    total = f"of {len(rows)}"
    yield f"  maths     reads {maths} {total} answers; others are right only as they are spelled"
    yield f"  exact     {short} {total} answers are a line of at most {_LONGEST_EXACT} characters"
    yield f"  countdown {puzzles} {total} rows are its puzzles"


def _is_read(answer: str) -> bool:
    with contextlib.suppress(Unreadable, RecursionError):
        return bool(answer) and read(answer) is not None
    return False


def _is_puzzle(row: Row) -> bool:
    with contextlib.suppress(UserError):
        return countdown.verify(row.text, "", row.answer) == 0.0
    return False

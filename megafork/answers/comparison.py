"""The comparison of two answers, and one text for all that are equal."""

from __future__ import annotations

import contextlib
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from megafork.answers.formulas import Unreadable
from megafork.answers.latex import spelled, tree
from megafork.answers.reader import read
from megafork.answers.values import Value, canonical, equal

_DECIMAL = re.compile(r"[+-]?[0-9]{1,300}(?:\.[0-9]{1,300})?")
_EULERS = re.compile(r"(?<![0-9.])((?!1e)[0-9]+)e(?=[+-][0-9](?![0-9.]))")
_AROUND = re.compile(r"(?:\\[,;:! ()]|\\\[(?!\d)|[\s$~])+")


def are_equal(gold: str, found: str) -> bool:
    """Return whether two answers are equal, of which `gold` is known to be right."""
    if not found or found == gold:
        return found == gold
    if _DECIMAL.fullmatch(gold) and _DECIMAL.fullmatch(found):
        return Fraction(gold) == Fraction(found)
    (text, values), (wanted, right) = _read(found), _read_gold(gold)
    return text == wanted or any(_equal(one, other) for one in right for other in values)


def canonical_answer(text: str) -> str:
    """Return the text that all spellings of an answer share, by which votes are counted.

    Units, percent signs and the name of a variable are left out; an answer that cannot be read
    stands for itself.
    """
    spelling, values = _read(bare(text))
    try:
        return canonical(values[0]) if values else spelling
    except (Unreadable, RecursionError):
        return spelling


def _equal(one: Value, other: Value) -> bool:
    try:
        return equal(one, other)
    except (Unreadable, RecursionError):
        return False


def bare(text: str) -> str:
    """Return the text without the blanks, dollars and full stop around it."""
    text = unicodedata.normalize("NFC", text) if len(text) < 1000 else text
    start = found.end() if (found := _AROUND.match(text)) else 0
    end = len(text)
    while end > start:
        last, before = text[end - 1], text[end - 2 : end - 1]
        is_stop = last in ".,;:" and not (last == before == ".")
        if not (last.isspace() or last in "$~\\" or is_stop or (before == "\\" and last in "!)]")):
            break
        end -= 1
    return text[start:end]


def _read(text: str) -> tuple[str, list[Value]]:
    """Return how the text is spelled, and the values it may have: two where 2e-1 is a power of ten
    or Euler's number, none where it cannot be read."""
    try:
        spelling = f"={spelled(tree(text))}"
    except Unreadable:
        spelling = " ".join(text.split())
    readings = [text, _EULERS.sub(r"\1 e", text)] if _EULERS.search(text) else [text]
    values = []
    for reading in readings:
        with contextlib.suppress(Unreadable, RecursionError):
            values.append(read(reading))
    return spelling, values


@lru_cache(maxsize=4096)
def _read_gold(text: str) -> tuple[str, list[Value]]:
    """Read the known answer once for all responses of a group and for all epochs."""
    return _read(text)

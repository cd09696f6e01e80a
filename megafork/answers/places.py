r"""The place of the answer in a text: a box, an answer line, behind ####, or the last number.

It is looked for in a response, for the vote of maj@k, and in an answer of the data that is a whole
solution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

Place = Literal["boxed", "answer_line", "hash", "last_number"]

BOXED: tuple[Place, ...] = ("boxed",)
LONGEST = 40_000
"""Characters of an answer; a longer one is none"""
_TAIL = 20_000
"""Characters at the end in which the last number is looked for"""
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(
    r"^[^\w\n\\]{0,12}(?:the[ \t]{1,3})?(?:final[ \t]{1,3}|correct[ \t]{1,3})?answer[*_ \t]{0,8}"
    r"(?:(?:is)?[*_ \t]{0,8}[:\uff1a]|is(?=[ \t$*\\]))[*_ \t]{0,8}(?P<answer>[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_HASH_LINE = re.compile(r"^[ \t]{0,8}####(?!#)[ \t]{0,8}(?P<answer>[^\n]*)", re.MULTILINE)
_NUMBER = re.compile(
    r"""(?: (?<![\w)\]}.]) [-+\u2212] \s? )? (?:
      \\[dt]?frac \s? \{ \s? \d{1,300} \s? \} \{ \s? \d{1,300} \s? \}
    | (?<![\w.]) \$? (?: \d{1,3} (?:,\d{3}){1,100} (?![\d]) | \d{1,10000} ) (?: \.\d{1,10000} )?
      (?: /\d{1,300} )? (?: [eE][+-]?\d{1,5} )? \s? (?: \\?% )?
    | (?<![\w.]) \.\d{1,10000}
    )""",
    re.VERBOSE,
)


def find_answer(text: str, places: Sequence[Place]) -> str | None:
    """Return the answer at the first of `places` that has one which is not blank; None where none
    has."""
    for place in places:
        found = _FINDERS[place](text)
        if found is not None and found.strip():
            return found.strip()
    return None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{...}; None where there is none, or none that is closed
    within LONGEST characters."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    content = text[start + len("\\boxed") : start + len("\\boxed") + LONGEST].lstrip()
    depth = 0
    for brace in _BRACES.finditer(content):
        if depth == 0 and brace.start() > 0:
            return None
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return content[1 : brace.start()] if brace[0] == "}" else None
    return None


def answer_line(text: str) -> str | None:
    """Return the text after the last `Answer:` that begins a line, or the content of a box in
    it."""
    return _last(_ANSWER_LINE, text)


def behind_hash(text: str) -> str | None:
    """Return the text after the last `####` that begins a line, as in GSM8K's answers."""
    return _last(_HASH_LINE, text)


def last_number(text: str) -> str | None:
    """Return the last decimal or fraction, with its sign."""
    last = None
    for found in _NUMBER.finditer(text[-_TAIL:]):
        last = found[0].strip()
    return last


def _last(line: re.Pattern[str], text: str) -> str | None:
    last = None
    for found in line.finditer(text):
        last = found
    if last is None:
        return None
    answer = last["answer"].strip(" \t*_")
    if len(answer) > LONGEST:
        return None
    return last_boxed(answer) if "\\boxed" in answer else answer


_FINDERS: dict[Place, Callable[[str], str | None]] = {
    "boxed": last_boxed,
    "answer_line": answer_line,
    "hash": behind_hash,
    "last_number": last_number,
}
PLACES: tuple[Place, ...] = tuple(_FINDERS)
_MARKED: tuple[Place, ...] = ("boxed", "hash", "answer_line")
"""Places that nothing but an answer stands at"""


def gold_answer(answer: str, places: Sequence[Place]) -> str:
    """Return the answer of the data: where it is marked, at one of `places` before others; else all
    of it.

    The last number is looked for only in a text of several sentences: it would take the 2 of 1/2 or
    the 5 of x = 5 for the whole.
    """
    if (box := last_boxed(answer)) is not None and not box.strip():
        return ""
    marked = [place for place in places if place in _MARKED]
    found = find_answer(answer, [*marked, *_MARKED])
    if found is None and "last_number" in places and len(answer.split()) > _FEW_WORDS:
        found = last_number(answer)
    return answer.strip() if found is None else found


_FEW_WORDS = 8


class Search:
    """Looks whether the first responses of a run have an answer at all."""

    FIRST = 64

    def __init__(self, places: Sequence[Place]) -> None:
        self._places, self._seen = places, 0

    def look(self, response: str) -> str | None:
        """Return a warning for the user, once, when none of the first responses has an answer."""
        if self._seen >= self.FIRST:
            return None
        if find_answer(response, self._places) is not None:
            self._seen = self.FIRST
            return None
        self._seen += 1
        if self._seen < self.FIRST:
            return None
        elsewhere = [
            f"{place} would find {found[:40]!r} in it"
            for place in PLACES
            if (found := find_answer(response, [place])) is not None
        ]
        hint = "; ".join(elsewhere) or f"{', '.join(PLACES)}, or a list of them"
        return (
            f"warning: none of the first {self.FIRST} responses has an answer where "
            f"reward.answer_from={','.join(self._places)} looks for it, so all of them score 0. "
            f"One ends with {response[-200:]!r}. Set reward.answer_from to where the answer stands "
            f"({hint}), have data.template ask for it there, or raise rollout.max_response_tokens "
            "if responses are cut"
        )

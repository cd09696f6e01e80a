r"""Verifier for mathematics: the last \boxed{...} of a response, compared by math-verify.

Nothing but LaTeX is read: math-verify's reader of plain expressions goes through sympy's
`parse_expr`, which evaluates text as code. There is no time limit in here, for math-verify's own
are signals that undo others'; the worker's deadline holds. docs/verifiers.md: what counts as equal.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse
from math_verify import verify as are_equal

from megafork.errors import UserError

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing time limits

_LONGEST = 1000
"""Characters of a boxed answer; matrices of a contest have a few hundred"""
_DEEPEST = 10
"""Brackets in brackets; the parser's time doubles with each"""
_LARGEST_EXPONENT = 99_999
_IN_BOX = [LatexExtractionConfig(boxed_match_priority=0)]
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,300}\.[0-9]{1,300}|[+-]?[0-9]{1,300}")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(?![0-9,])")
_SPACING = re.compile(r"\\[,;:!>]|\\(?:left|right|displaystyle)(?![a-zA-Z])|~|\$")
_AROUND_SIGNS = re.compile(r"\s*([^\w\s\\])\s*")
_POWER = re.compile(r"\^[\s{(]*([0-9]+)")
_TOWER = re.compile(r"\^[\s{(]*([0-9]+)[\s})]*\^[\s{(]*([0-9]+)")
_HIGH_TOWER = re.compile(r"\^[\s{(]*[^\s{}()^+*/=,&-]*[\s)]*\^[\s{(]*[^\s{}()^+*/=,&-]*[\s)]*\^")
_FACTORIAL = re.compile(r"[0-9]{5,}[\s})]*!|!\s*[)}\s]*!")


def verify(prompt: str, response: str, answer: str) -> float:
    r"""1.0 when the text of the last \boxed{...} equals `answer`, else 0.0.

    A response without a box, or whose last box is not closed, is wrong. Raises UserError for an
    answer that is empty.
    """
    unboxed = last_boxed(answer)
    gold = _normalized(answer if unboxed is None else unboxed)
    if not gold:
        raise UserError(f"maths: the answer of the prompt {prompt[:60]!r} is empty: {answer!r}")
    boxed = last_boxed(response)
    if boxed is None:
        return 0.0
    found = _normalized(boxed)
    if found == gold:
        return 1.0
    if not found:
        return 0.0
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(found):
        return float(int(gold) == int(found))
    if _DECIMAL.fullmatch(gold) and _DECIMAL.fullmatch(found) and Fraction(gold) == Fraction(found):
        return 1.0
    if _is_excessive(found) or _is_excessive(gold):
        return 0.0
    return float(are_equal(_parsed(gold), _read(found), timeout_seconds=None))


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds; None without one, or when it has no end in sight."""
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    content = text[start + len("\\boxed") : start + len("\\boxed") + 4 * _LONGEST].lstrip()
    depth = 0
    for brace in _BRACES.finditer(content):
        if depth == 0 and brace.start() > 0:
            return None
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return content[1 : brace.start()] if brace[0] == "}" else None
    return None


def _normalized(text: str) -> str:
    """Spelled one way, as far as that is safe without understanding it."""
    text = unicodedata.normalize("NFC", text).strip().replace("\u2212", "-")
    text = _SPACING.sub("", text.replace("\\$", "").replace("{,}", ","))
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _AROUND_SIGNS.sub(r"\1", text.strip()).rstrip(".,;: ")
    if _THOUSANDS.match(text):
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text, count=1)
    return text


def _is_excessive(text: str) -> bool:
    """Would take sympy longer than any honest answer: too long, too deep, towers, factorials."""
    if len(text) > _LONGEST or _HIGH_TOWER.search(text) or _FACTORIAL.search(text):
        return True
    if any(len(n) > 6 or int(n) > _LARGEST_EXPONENT for n in _POWER.findall(text)):
        return True
    for base, exponent in _TOWER.findall(text):
        if len(exponent) > 3 or int(base) ** int(exponent) > _LARGEST_EXPONENT:
            return True
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({[") - (sign in ")}]")
        deepest = max(deepest, depth)
    return deepest > _DEEPEST


def _read(text: str) -> list[Any]:
    return parse(f"\\boxed{{{text}}}", _IN_BOX, parsing_timeout=None)


@lru_cache(maxsize=4096)
def _parsed(gold: str) -> list[Any]:
    """Once for all responses of a group, and for its epochs."""
    return _read(gold)

"""What a response answers: the unit that maj@k counts."""

from __future__ import annotations

import re
from typing import Literal

_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_SPACE = re.compile(r"\s+")


def extract(response: str, how: Literal["auto", "boxed", "text"], *, truncated: bool) -> str | None:
    """The answer as the string that votes are counted by; None: no vote.

    boxed: what the last \\boxed{...} that is closed holds, without blanks. text: the whole
    response, stripped. auto: the box; where there is none, the text of a response that ended.
    """
    if how == "text":
        return response.strip() or None
    box = last_boxed(response)
    if box is not None or how == "boxed" or truncated:
        return box
    return response.strip() or None


def last_boxed(response: str) -> str | None:
    """Content of the last \\boxed{...} whose braces close; None: there is none, or it is empty.

    One pass, however many boxes stay open. An escaped brace is text.
    """
    open_braces: list[int | None] = []  # where a box's content begins; None: another brace
    last = (-1, -1)
    for token in _TOKEN.finditer(response):
        if token.group() == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start > last[0]:
                last = (start, token.start())
        elif token.group()[-1] == "{" and token.group() != "\\{":
            open_braces.append(token.end() if "boxed" in token.group() else None)
    return _SPACE.sub("", response[slice(*last)]) or None if last[0] >= 0 else None

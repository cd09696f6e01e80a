"""Text of models, verifiers and files, made safe and visible for terminals, pages and pictures."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping

_KEPT = "\n\t"
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories: controls (ESC and CSI among them), formats (which turn the direction of
text or hide it), surrogates, and separators of lines and paragraphs"""


def printable(text: str) -> str:
    """Return `text` with Python's escapes for every character that a terminal would act on."""
    return "".join(c if _is_shown(c) else escaped(c) for c in text)


def escaped(character: str) -> str:
    """Return the character as Python escapes it: \\x1b, \\u202e."""
    return character.encode("unicode_escape").decode()


def token_text(text: str, signs: Mapping[str, str], escape: Callable[[str], str] = escaped) -> str:
    """Return a token's text so that every character of it can be seen.

    `signs` stand for their characters; of the others those that leave no mark, or one on their
    neighbours (separators, controls, formats, surrogates, unassigned ones), are escaped.
    """
    return "".join(
        signs.get(c) or (escape(c) if unicodedata.category(c)[0] in "ZC" else c) for c in text
    )


def _is_shown(character: str) -> bool:
    return character in _KEPT or unicodedata.category(character) not in _HIDDEN


def as_cell(text: str) -> str:
    """Return `text` as a cell of a CSV file, with a ' before what a spreadsheet would compute."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text

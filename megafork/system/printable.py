"""Text of models, verifiers and files, made safe for a terminal, a log or a CSV file."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories: controls (ESC and CSI among them), formats (which turn the direction of
text or hide it), surrogates, and separators of lines and paragraphs"""


def printable(text: str) -> str:
    """Return `text` with Python's escapes for every character that a terminal would act on."""
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    return character in _KEPT or unicodedata.category(character) not in _HIDDEN


def as_cell(text: str) -> str:
    """Return `text` as a cell of a CSV file, with a ' before what a spreadsheet would compute."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text

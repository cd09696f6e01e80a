"""Labels of tokens whose every character can be seen, and the fonts that draw them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from megafork.errors import UserError
from megafork.system.printable import escaped, token_text

_SIGNS = {" ": "·", "·": "\\xb7", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_UNDECODED = "\ufffd"


def token_label(token_id: int, text: str, longest: int) -> str:
    """A token's text with blanks and control characters shown, cut to `longest` characters.

    The id stands for a token without text and for a part of a character's bytes.
    """
    if not text or _UNDECODED in text:
        return f"<{token_id}>"
    shown = token_text(text, _SIGNS)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


class Font:
    """A TrueType or OpenType file; None: DejaVu Sans, which comes with matplotlib and has Latin,
    Greek, Cyrillic, Arabic and Hebrew letters and mathematical signs, but neither Chinese, Japanese
    nor Korean."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises UserError for a file that is no font."""
        from matplotlib import font_manager
        from matplotlib.ft2font import FT2Font

        self.path = str(path or font_manager.findfont("DejaVu Sans"))
        try:
            self._characters = frozenset(FT2Font(self.path).get_charmap())
        except (OSError, RuntimeError) as error:
            raise UserError(f"--font {path} cannot be read as a font: {error}") from None

    def can_draw(self, text: str) -> bool:
        return all(ord(character) in self._characters for character in text)

    def drawable(self, text: str) -> str:
        """Return the text, with an escape for each character that the font lacks."""
        return "".join(c if ord(c) in self._characters else escaped(c) for c in text)

    def properties(self, size: float) -> Any:
        from matplotlib.font_manager import FontProperties

        return FontProperties(fname=self.path, size=size)

    @cached_property
    def name(self) -> str:
        return Path(self.path).stem

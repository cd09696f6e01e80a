"""JSON of files that a person may have damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(text: str | bytes | bytearray, number: Callable[[str], Any] | None = None) -> Any:
    """Parse as json.loads does; every refusal is a ValueError, of nesting that is too deep too.

    number: makes a value of a number's text, of NaN and Infinity too; None makes Python's own.
    """
    try:
        return json.loads(text, parse_float=number, parse_int=number, parse_constant=number)
    except RecursionError:
        raise ValueError("nested too deep") from None

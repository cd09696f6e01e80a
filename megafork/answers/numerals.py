"""Exact numbers from digits: decimals, powers of ten, decimals that repeat."""

from __future__ import annotations

import re
from fractions import Fraction

from megafork.answers.formulas import MOST_DIGITS, Unreadable

REPEATING = re.compile(
    r"""(?P<whole>\d*)\.(?P<fixed>\d*)(?:
      \\(?:overline|bar)\s*\{(?P<line>\d+)\}
    | \\(?:overline|bar)\s*(?P<digit>\d)(?!\d)
    | \((?P<round>\d+)\)
    | (?P<dots>\\dot\s*\{?\d\}?(?:\d*\\dot\s*\{?\d\}?)?)(?![\d\\])
    )""",
    re.VERBOSE | re.ASCII,
)
GOES_ON = re.compile(r"(?P<whole>\d*)\.(?P<digits>\d{3,60})\s*(?:\\[lc]?dots|\.{3})", re.ASCII)


def decimal(text: str) -> Fraction:
    """Return the number that digits with a point, separated thousands and an exponent spell."""
    mantissa, _, exponent = re.sub(r"[^\d.eE+-]", "", text).replace("E", "e").partition("e")
    whole, _, fraction = mantissa.partition(".")
    shift = _exponent(exponent) - len(fraction)
    if len(whole) + len(fraction) > MOST_DIGITS or abs(shift) > MOST_DIGITS:
        raise Unreadable("too many digits")
    digits = _integer(whole + fraction)
    return Fraction(digits * 10**shift) if shift >= 0 else Fraction(digits, 10**-shift)


def _exponent(text: str) -> int:
    if len(text) > 7:
        raise Unreadable("too large an exponent")
    return int(text or "0")


def _integer(digits: str) -> int:
    """Read digits in pieces: Python refuses to read more than 4300 at once."""
    value = 0
    for start in range(0, len(digits), 4000):
        piece = digits[start : start + 4000]
        value = value * 10 ** len(piece) + int(piece)
    return value


def repeating(found: re.Match[str]) -> Fraction:
    """Return the value of 0.1\\overline{6}, 0.1(6), 0.1\\dot{6} or 0.1666..."""
    parts = found.groupdict()
    if "digits" in parts:
        fixed, block = _block(parts["digits"])
    elif parts["dots"]:
        fixed, block = parts["fixed"], re.sub(r"\D", "", parts["dots"])
    else:
        fixed, block = parts["fixed"], parts["line"] or parts["digit"] or parts["round"]
    if len(parts["whole"]) + len(fixed) + len(block) > MOST_DIGITS:
        raise Unreadable("too many digits")
    scale = 10 ** len(fixed)
    value = Fraction(_integer((parts["whole"] or "") + fixed or "0"), scale)
    return value + Fraction(_integer(block), scale * (10 ** len(block) - 1))


def _block(digits: str) -> tuple[str, str]:
    """The digits before the shortest block that repeats at the end, and the block: one digit three
    times, or more of them twice."""
    for length in range(1, len(digits) // 2 + 1):
        block = digits[-length:]
        times = 3 if length == 1 else 2
        if digits.endswith(block * times):
            kept = digits
            while kept.endswith(block):
                kept = kept[:-length]
            return kept, block
    raise Unreadable("digits that go on, one does not see how")

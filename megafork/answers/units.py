"""Units behind a number: what they measure, and how much of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from megafork.answers.formulas import Unreadable

PERCENT, DEGREE = "percent", "degree"


@dataclass(frozen=True)
class Unit:
    """dimensions: (what, power) sorted; factor: how much of them."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """percent, degree, or another text."""
        return "*".join(
            f"{what}^{power}" if power != 1 else what for what, power in self.dimensions
        )


_LENGTHS = {
    "nm nanometer": Fraction(1, 10**9),
    "mm millimeter millimetre": Fraction(1, 1000),
    "cm centimeter centimetre": Fraction(1, 100),
    "dm decimeter decimetre": Fraction(1, 10),
    "m meter metre": Fraction(1),
    "km kilometer kilometre": Fraction(1000),
    "in inch inche": Fraction(254, 10000),
    "ft foot feet": Fraction(3048, 10000),
    "yd yard": Fraction(9144, 10000),
    "mi mile": Fraction(1609344, 1000),
}
_TIMES = {
    "ms millisecond": Fraction(1, 1000),
    "s sec second": Fraction(1),
    "min minute": Fraction(60),
    "h hr hour": Fraction(3600),
    "day": Fraction(86400),
    "week": Fraction(7 * 86400),
}
_MASSES = {
    "mg milligram": Fraction(1, 1000),
    "g gram": Fraction(1),
    "kg kilogram": Fraction(1000),
}
_VOLUMES = {
    "ml milliliter millilitre": Fraction(1, 1000),
    "l liter litre": Fraction(1),
}
_TEMPERATURES = {name: what for what in ("celsius", "fahrenheit") for name in (what, what[0])}
_MONEY = {"dollar usd": Fraction(1), "cent": Fraction(1, 100)}
_BASES = {
    name: (what, factor)
    for what, table in {
        "length": _LENGTHS,
        "time": _TIMES,
        "mass": _MASSES,
        "volume": _VOLUMES,
        "money": _MONEY,
    }.items()
    for names, factor in table.items()
    for name in names.split()
}
_BASES |= {name: (what, Fraction(1)) for name, what in _TEMPERATURES.items()}
_RATES = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmh": ("km", "h"), "mps": ("m", "s")}
_SPECIAL = {"percent": PERCENT, "pct": PERCENT, "degree": DEGREE, "deg": DEGREE}
_NOTHING_TEXT = """
unit u sq
"""
_NOTHING = frozenset(_NOTHING_TEXT.split())
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3}
_MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_NO_UNITS_TEXT = """
or and not no more less most least than about almost over under above below to from if when
where unless except plus minus times mod modulo base the is are was be a an by for with negative
positive half third quarter twice double square root only approximately roughly nearly between
up down point into out factorial reciprocal inverse choose infinity pi power halves fourth fifth
sixth seventh eighth ninth tenth hundredth thousandth score gross couple
"""
_NO_UNITS = frozenset(_NO_UNITS_TEXT.split())
_WORD = re.compile(r"[^\W\d_]+(?:\^\{?-?[1-9]\}?)?")
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = (
    {word: value for value, word in enumerate(_ONES)}
    | {word: 10 * value for value, word in enumerate(_TENS, 2)}
    | {
        f"{tens}-{ones}": 10 * value + extra
        for value, tens in enumerate(_TENS, 2)
        for extra, ones in enumerate(_ONES[1:10], 1)
    }
)


def is_known(word: str) -> bool:
    """A unit's own name, also where it stands without \\text."""
    word = _singular(word.lower())
    return (word in _BASES and len(word) > 1) or word in _RATES or word in _SPECIAL


def unit_of(words: Iterable[tuple[str, int]]) -> tuple[Unit | None, Fraction]:
    """Return (the unit or None, the number to multiply with) of words with their powers.

    Up to two unknown words are units of their own (apples). Raises Unreadable for words that are no
    unit.
    """
    dimensions: Counter[str] = Counter()
    factor, multiplier, unknown = Fraction(1), Fraction(1), 0
    side, raised = 1, 1
    for text, given in words:
        for word in re.findall(r"/|[^\s/.]+", text.lower()):
            if word in ("/", "per"):
                side = -1
                continue
            if word in _POWERS:
                if word in ("squared", "cubed"):
                    raise Unreadable(f"the unit {text!r}")
                raised = _POWERS[word]
                continue
            if word in _MULTIPLIERS:
                multiplier *= _MULTIPLIERS[word]
                continue
            if not {word, _singular(word)}.isdisjoint(_NO_UNITS) or word in NUMBER_WORDS:
                raise Unreadable(f"{word!r} is no unit")
            if not _WORD.fullmatch(word) or (len(word) == 1 and word not in _BASES):
                raise Unreadable(f"{word!r} is no unit")
            word, _, exponent = word.partition("^")
            power = side * raised * given * int(exponent.strip("{}") or "1")
            raised = 1
            word = _singular(word)
            if word in _NOTHING:
                continue
            above, below = _RATES.get(word, (word, ""))
            for name, sign in ((above, 1), (below, -1)):
                if not name:
                    continue
                what, size = _BASES.get(name, (_SPECIAL.get(name, name), Fraction(1)))
                unknown += what == name and name not in (PERCENT, DEGREE)
                dimensions[what] += sign * power
                factor *= size ** (sign * power)
    if unknown > 2:
        raise Unreadable("too many words for a unit")
    kept = tuple(sorted((what, power) for what, power in dimensions.items() if power))
    return (Unit(kept, factor) if kept else None), multiplier


def _singular(word: str) -> str:
    if word in _BASES or word in _SPECIAL or len(word) < 3 or not word.endswith("s"):
        return word
    return word[:-3] + "y" if word.endswith("ies") else word[:-1]

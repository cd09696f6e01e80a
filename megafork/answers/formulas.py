"""Formulas: exact numbers, variables, and the operations on them.

Rational numbers stay rational (`Fraction`) and are worked out at once, the rest stays as it is;
zeros.py compares. A formula that would take too long, or has no value, is `Unreadable`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

MOST_DIGITS = 10_000
_TOO_LARGE = 10**MOST_DIGITS
_MOST_BITS = 4 * MOST_DIGITS
_LARGEST_ROOT = 64
FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "sinh",
        "cosh",
        "tanh",
        "arcsin",
        "arccos",
        "arctan",
        "exp",
        "ln",
    ]
)
CONSTANTS = ("\\pi", "e", "i", "\\infty")


class Unreadable(Exception):
    """The text is not understood, or it takes more than we compute."""


@dataclass(frozen=True)
class Term:
    """A formula: `kind` number (`value`), symbol (`name`), sum, product, quotient, power, root
    (`index`), function (`name`), abs, floor or ceil, of its `parts`."""

    kind: str
    parts: tuple[Term, ...] = ()
    value: Fraction = Fraction(0)
    name: str = ""
    index: int = 0
    size: int = field(default=1, compare=False)
    """Terms in it; a root counts as many as its index"""


def _term(kind: str, *parts: Term, name: str = "", index: int = 0) -> Term:
    size = 1 + index + sum(part.size for part in parts)
    return Term(kind, parts, name=name, index=index, size=size)


def number(value: Fraction | int) -> Term:
    """Return a rational number as a term. Raises Unreadable beyond MOST_DIGITS digits above or
    below the line."""
    value = Fraction(value)
    if abs(value.numerator) >= _TOO_LARGE or value.denominator >= _TOO_LARGE:
        raise Unreadable("a number of too many digits")
    return Term("number", value=value)


def symbol(name: str) -> Term:
    return Term("symbol", name=name)


INFINITY = symbol("\\infty")
IMAGINARY = symbol("i")
DEGREE = Term(
    "product", (number(Fraction(1, 180)), symbol("\\pi")), size=3
)  # in radians, as all angles are


def add(*terms: Term) -> Term:
    whole, rest = Fraction(0), []
    for term in terms:
        if term.kind == "number":
            whole += term.value
        else:
            rest.append(term)
    if not rest or whole:
        rest.append(number(whole))
    return rest[0] if len(rest) == 1 else _finite("sum", *rest)


def multiply(*terms: Term) -> Term:
    whole, rest = Fraction(1), []
    for term in terms:
        if term.kind == "number":
            whole = number(whole * term.value).value
        else:
            rest.append(term)
    if abs(whole) == 1 and rest == [INFINITY]:
        return INFINITY if whole > 0 else Term("product", (number(-1), INFINITY), size=3)
    if not rest or whole == 0:
        return number(whole)
    if whole != 1:
        rest.append(number(whole))
    return rest[0] if len(rest) == 1 else _finite("product", *rest)


def negate(term: Term) -> Term:
    return multiply(number(-1), term)


def divide(above: Term, below: Term) -> Term:
    """Return above / below. Raises Unreadable for a denominator that is 0."""
    if below.kind == "number":
        if below.value == 0:
            raise Unreadable("division by zero")
        return multiply(number(1 / below.value), above)
    return _finite("quotient", above, below)


def power(base: Term, exponent: Term) -> Term:
    if exponent.kind != "number":
        return _finite("power", base, exponent)
    above, below = exponent.value.numerator, exponent.value.denominator
    if below > _LARGEST_ROOT:
        return call("exp", multiply(exponent, call("ln", base)))
    if below > 1:
        return power(root(below, base), number(above))
    if base.kind == "number":
        if base.value == 0 and above <= 0:
            raise Unreadable("0 to no positive power")
        bits = max(abs(base.value.numerator).bit_length(), base.value.denominator.bit_length())
        if (bits - 1) * abs(above) > _MOST_BITS:
            raise Unreadable("a power of too many digits")
        return number(base.value**above)
    return base if above == 1 else _finite("power", base, exponent)


def root(index: int, term: Term) -> Term:
    """Return the real root where there is one; the square root of a negative number is
    imaginary."""
    if not 2 <= index <= _LARGEST_ROOT:
        raise Unreadable("a root of that kind")
    if term.kind != "number":
        return _finite("root", term, index=index)
    if term.value < 0:
        if index % 2:
            return negate(root(index, negate(term)))
        if index == 2:
            return multiply(IMAGINARY, root(2, negate(term)))
        raise Unreadable("an even root of a negative number")
    above = _whole_root(index, term.value.numerator)
    below = _whole_root(index, term.value.denominator)
    if above is not None and below is not None:
        return number(Fraction(above, below))
    return _term("root", term, index=index)


def call(name: str, term: Term) -> Term:
    """A function of FUNCTIONS, or abs, floor, ceil."""
    if name == "ln" and term == number(1):
        return number(0)
    if name not in ("abs", "floor", "ceil"):
        return _finite("function", term, name=name)
    if term.kind == "number":
        value = term.value
        return number(abs(value) if name == "abs" else getattr(math, name)(value))
    return _finite(name, term)


def factorial(term: Term) -> Term:
    if term.kind != "number" or term.value.denominator != 1 or not 0 <= term.value <= 4000:
        raise Unreadable("a factorial of that")
    return number(math.factorial(term.value.numerator))


def binomial(above: Term, below: Term) -> Term:
    if below.kind != "number" or below.value.denominator != 1 or below.value < 0:
        raise Unreadable("a binomial coefficient of that")
    chosen = below.value.numerator
    if above.kind != "number":
        if chosen > 20:
            raise Unreadable("a binomial coefficient of that")
        factors = [add(above, number(-i)) for i in range(chosen)]
        return divide(multiply(*factors), number(math.factorial(chosen)))
    if above.value.denominator != 1 or not 0 <= above.value <= 40_000:
        raise Unreadable("a binomial coefficient of that")
    return number(math.comb(above.value.numerator, chosen))


def variables(term: Term) -> set[str]:
    found, todo = set(), [term]
    while todo:
        term = todo.pop()
        todo += term.parts
        if term.kind == "symbol" and term.name not in CONSTANTS:
            found.add(term.name)
    return found


def is_infinite(term: Term) -> int:
    """Return 1 or -1 for an infinite term, 0 for a finite one."""
    if term == INFINITY:
        return 1
    return -1 if term == negate(INFINITY) else 0


def substitute(term: Term, point: Mapping[str, Fraction]) -> Term:
    """Return the term with its variables replaced by the numbers of `point`."""
    if term.kind == "symbol":
        return number(point[term.name]) if term.name in point else term
    if not term.parts:
        return term
    parts = [substitute(part, point) for part in term.parts]
    match term.kind:
        case "sum":
            return add(*parts)
        case "product":
            return multiply(*parts)
        case "quotient":
            return divide(*parts)
        case "power":
            return power(*parts)
        case "root":
            return root(term.index, *parts)
    return call(term.name or term.kind, *parts)


def _finite(kind: str, *parts: Term, name: str = "", index: int = 0) -> Term:
    if any(is_infinite(part) for part in parts if part.kind in ("symbol", "product")):
        raise Unreadable("a formula with infinity in it")
    return _term(kind, *parts, name=name, index=index)


def _whole_root(index: int, value: int) -> int | None:
    if value < 2:
        return value
    guess = math.isqrt(value) if index == 2 else 1 << -(-value.bit_length() // index)
    while index > 2:  # Newton's, from above
        lower = ((index - 1) * guess + value // guess ** (index - 1)) // index
        if lower >= guess:
            break
        guess = lower
    return guess if guess**index == value else None


def written(value: Fraction) -> str:
    """Return the number as text, in hexadecimal where it is long: Python refuses to write more than
    4300 decimal digits."""
    if max(abs(value.numerator), value.denominator) < 10**1000:
        return str(value)
    return f"{value.numerator:x}/{value.denominator:x}"

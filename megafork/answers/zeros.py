"""Equality of formulas, decided with more digits than a difference can hide behind.

For roots the separation bound of Burnikel, Funke, Mehlhorn, Schirra and Schmitt ("A separation
bound for real algebraic expressions", 2001) is a theorem: a value of that shape that is not 0 is
not nearer to 0. For pi, e, logarithms and angles the same count of digits is a rule of thumb with
hundreds of bits to spare. Variables are replaced by rational numbers that are drawn from the
formulas themselves. A comparison that would take too long raises Unreadable, and the formulas do
not count as equal.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import mpmath

from megafork.answers.formulas import (
    Term,
    Unreadable,
    add,
    divide,
    is_infinite,
    multiply,
    negate,
    number,
    substitute,
    variables,
    written,
)

_MOST_SEPARATION = 50_000
"""Bits of a difference of two formulas"""
_MOST_WORK = 5_000_000
"""Terms of a formula times bits of its precision"""
_OPEN_BITS = 300
"""Bits that a logarithm, an angle or a power with such an exponent may add to both bounds"""
_FINGERPRINT_BITS = 256
_POINTS = 3
_MPMATHS = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
"""Names of functions that are others there"""
_MP: Any = mpmath.mp.clone()
"""A context of our own: its precision is nobody else's"""


def same(one: Term, other: Term) -> bool:
    """Return whether two formulas are equal. Raises Unreadable."""
    if one == other:
        return True
    if is_infinite(one) or is_infinite(other):
        return False
    return is_zero(add(one, negate(other)))


def proportional(one: Term, other: Term, *, positive: bool) -> bool:
    """Return whether `one` is `other` times a constant that is not 0. Raises Unreadable."""
    names = variables(one)
    if names != variables(other) or not names:
        return False
    point = next(_points((one, other), names))
    first, second = (substitute(term, point) for term in (one, other))
    if is_zero(first) or is_zero(second):
        return False
    if positive and sign(first) != sign(second):
        return False
    return is_zero(add(multiply(one, second), negate(multiply(other, first))))


def is_zero(term: Term) -> bool:
    """Return whether the term is 0, for all values of its variables. Raises Unreadable."""
    names = variables(term)
    if names:
        return all(is_zero(substitute(term, point)) for point in _points((term,), names))
    if term.kind == "number":
        return term.value == 0
    separation = _separation(term)
    return bool(abs(_computed(term, separation)) < _MP.mpf(2) ** -separation)


def sign(term: Term) -> int:
    """Return the sign (-1, 0, 1) of infinity or of a real number without variables. Raises
    Unreadable."""
    if infinite := is_infinite(term):
        return infinite
    if term.kind == "number":
        return (term.value > 0) - (term.value < 0)
    if variables(term):
        raise Unreadable("a number with a variable in it")
    separation = _separation(term)
    value, bound = _computed(term, separation), _MP.mpf(2) ** -separation
    if abs(_MP.im(value)) >= bound:
        raise Unreadable("a complex number has no sign")
    value = _MP.re(value)
    return 0 if abs(value) < bound else (1 if value > 0 else -1)


def fingerprint(term: Term) -> str:
    """Return a text that all equal formulas share. Raises Unreadable.

    Rational numbers are written as such, the rest as 40 digits, with variables at fixed points.
    """
    if infinite := is_infinite(term):
        return "\\infty" if infinite > 0 else "-\\infty"
    names = sorted(variables(term))
    if not names:
        return _digits(term)
    values = (_digits(substitute(term, point)) for point in _points((), names))
    return f"{','.join(names)}:{';'.join(values)}"


def shape(term: Term, *, signed: bool) -> str:
    """`fingerprint` of what is left of `term` without a constant factor; signed: a positive one."""
    names = sorted(variables(term))
    first, *others = [substitute(term, point) for point in _points((), names)]
    rest = ";".join(_digits(divide(other, first)) for other in others)
    return f"{','.join(names)}:{'+-'[sign(first) < 0] if signed else ''}{rest}"


def _points(terms: Iterable[Term], names: Iterable[str]) -> Iterator[dict[str, Fraction]]:
    """Values for variables: positive ones, then of both signs. They follow from the formulas, so
    that no formula can be made to vanish at them."""
    seed = hashlib.sha256("=".join(map(_spelled, terms)).encode()).digest()
    draw = random.Random(seed)
    names = sorted(names)
    for index in range(_POINTS):
        yield {
            name: Fraction(draw.randint(1 << 18, 1 << 22), 1 << 20)
            * (1, -1, draw.choice((1, -1)))[index]
            for name in names
        }


def _spelled(term: Term) -> str:
    leaf = written(term.value) if term.kind == "number" else f"{term.name}{term.index or ''}"
    return f"{term.kind} {leaf}({','.join(map(_spelled, term.parts))})"


def _separation(term: Term) -> int:
    """Bits: no value of its shape but 0 is nearer to 0 than 2**-bits. Raises Unreadable."""
    roots: set[tuple[int, Term]] = set()
    above, below = _bounds(term, roots)
    degree = math.prod(index for index, _ in roots)
    separation = degree * (above + below) + 8
    if separation > _MOST_SEPARATION or separation * term.size > _MOST_WORK:
        raise Unreadable("more digits than we compute")
    return math.ceil(separation)


def _bounds(term: Term, roots: set[tuple[int, Term]]) -> tuple[float, float]:
    """Logarithms (base 2) of BFMSS's u and l; the degree's factors go to `roots`."""
    if term.kind == "number":
        return abs(term.value.numerator).bit_length(), term.value.denominator.bit_length()
    if term.kind == "symbol":
        if term.name == "i":
            roots.add((2, term))
            return 0.0, 0.0
        return 64.0, 64.0
    parts = [_bounds(part, roots) for part in term.parts]
    (above, below), *others = parts
    match term.kind:
        case "sum":
            for u, low in others:
                above, below = max(above + low, u + below) + 1, below + low
        case "product":
            above, below = sum(u for u, _ in parts), sum(low for _, low in parts)
        case "quotient":
            ((u, low),) = others
            above, below = above + low, below + u
        case "power" if term.parts[1].kind == "number":
            exponent = term.parts[1].value.numerator
            above, below = abs(exponent) * above, abs(exponent) * below
            if exponent < 0:
                above, below = below, above
        case "root":
            roots.add((term.index, term.parts[0]))
            k = term.index
            if above >= below:
                above = (above + (k - 1) * below) / k
            else:
                below = ((k - 1) * above + below) / k
        case "abs":
            pass
        case _:
            above = below = _OPEN_BITS + sum(u + low for u, low in parts)
    return above, below


def _computed(term: Term, separation: int) -> Any:
    with _MP.workprec(2 * separation + 64 + term.size.bit_length()):
        try:
            return _value(term, _MP.mpf(2) ** -separation)
        except (ArithmeticError, ValueError, MemoryError) as error:
            raise Unreadable(str(error)) from None


def _value(term: Term, tiny: Any) -> Any:
    """Compute the term with mpmath, at its precision. tiny: a value nearer to 0 counts as 0."""
    if term.kind == "number":
        return _MP.mpf(term.value.numerator) / term.value.denominator
    if term.kind == "symbol":
        return {"\\pi": _MP.pi, "e": _MP.e, "i": _MP.j}[term.name] + 0
    values = [_value(part, tiny) for part in term.parts]
    first = values[0]
    match term.kind:
        case "sum":
            return sum(values[1:], first)
        case "product":
            return math.prod(values[1:], start=first)
        case "quotient":
            return _quotient(first, values[1], tiny)
        case "power" if term.parts[1].kind == "number":
            exponent = term.parts[1].value.numerator
            return first**exponent if exponent > 0 else _quotient(1, first**-exponent, tiny)
        case "power":
            exponent = values[1] * _MP.ln(_nonzero(first, tiny))
            _moderate(exponent)
            return _MP.exp(exponent)
        case "root":
            if term.index % 2 and abs(_MP.im(first)) < tiny and _MP.re(first) < 0:
                return -_MP.root(-_MP.re(first), term.index)
            return _MP.root(first, term.index)
        case "abs":
            return abs(first)
        case "floor" | "ceil":
            return _rounded(term.kind, first, tiny)
    return _function(term.name, first, tiny)


def _function(name: str, argument: Any, tiny: Any) -> Any:
    if name == "ln":
        return _MP.ln(_nonzero(argument, tiny))
    _moderate(argument)
    sine, cosine = _MP.sin, _MP.cos
    match name:
        case "tan":
            return _quotient(sine(argument), cosine(argument), tiny)
        case "cot":
            return _quotient(cosine(argument), sine(argument), tiny)
        case "sec":
            return _quotient(1, cosine(argument), tiny)
        case "csc":
            return _quotient(1, sine(argument), tiny)
    return getattr(_MP, _MPMATHS.get(name, name))(argument)


def _moderate(argument: Any) -> None:
    """Raise Unreadable for a function's argument that is too large for the digits we count."""
    if abs(argument) > _OPEN_BITS // 2:
        raise Unreadable("a function of so large a number")


def _nonzero(value: Any, tiny: Any) -> Any:
    if abs(value) < tiny:
        raise Unreadable("division by zero, or its logarithm")
    return value


def _quotient(above: Any, below: Any, tiny: Any) -> Any:
    return above / _nonzero(below, tiny)


def _rounded(kind: str, value: Any, tiny: Any) -> Any:
    if abs(_MP.im(value)) > tiny:
        raise Unreadable(f"the {kind} of a complex number")
    value = _MP.re(value)
    nearest = _MP.nint(value)
    if abs(value - nearest) < tiny:
        return nearest
    return _MP.floor(value) if kind == "floor" else _MP.ceil(value)


def _digits(term: Term) -> str:
    if term.kind == "number":
        return written(term.value)
    separation = max(_separation(term), _FINGERPRINT_BITS)
    value, bound = _computed(term, separation), _MP.mpf(2) ** -separation
    if abs(_MP.im(value)) < bound:
        rational = _near_rational(_MP.re(value))
        if same(term, number(rational)):
            return written(rational)
    real, imaginary = (0 if abs(part) < bound else part for part in (value.real, value.imag))
    return _decimal(real) + (f"+i*{_decimal(imaginary)}" if imaginary else "")


def _decimal(value: Any) -> str:
    """40 digits, or where the exponent is out of proportion the bits of as many."""
    with _MP.workprec(140):
        value = +_MP.mpf(value)
    if value == 0 or abs(_MP.mag(value)) < 1000:
        return str(_MP.nstr(value, 40))
    mantissa, exponent = value.man_exp
    return f"{mantissa >> 8:x}p{exponent}"


def _near_rational(value: Any) -> Fraction:
    return Fraction(int(_MP.nint(value * (1 << 128))), 1 << 128).limit_denominator(10**9)

"""The kinds of values that an answer can have, their equality, and one text for all that are equal.

`equal` is the judgement of a response against the answer of the data. It lets one side leave out
what the other says (a unit, a variable's name, a percent sign), so that it is no equivalence: 50%
equals 50 and 0.5. `canonical` is one, for the counting of votes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megafork.answers import formulas, zeros
from megafork.answers.formulas import DEGREE, Term, Unreadable, number
from megafork.answers.units import DEGREE as DEGREES
from megafork.answers.units import PERCENT, Unit

_MOST_ITEMS = 500


@dataclass(frozen=True)
class Quantity:
    term: Term
    unit: Unit | None = None


@dataclass(frozen=True)
class Ordered:
    """A tuple; brackets: `()`, `[]`, or the names of what is assigned."""

    items: tuple[Value, ...]
    brackets: str = "()"


@dataclass(frozen=True)
class Unordered:
    """A set, or values with commas or `or` between them; each counts as often as it is there."""

    items: tuple[Value, ...]


@dataclass(frozen=True)
class Interval:
    low: Term
    high: Term
    has_low: bool
    has_high: bool


@dataclass(frozen=True)
class Reals:
    """A union of intervals; none: the empty set."""

    parts: tuple[Interval, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Value, ...], ...]
    kind: str = ""


@dataclass(frozen=True)
class Relation:
    """`difference` = 0, != 0, < 0 or <= 0."""

    sign: str
    difference: Term


@dataclass(frozen=True)
class Named:
    """name = value, or name in value; relation: the same as an equation, where it is one."""

    name: str
    value: Value
    relation: Relation | None = None


@dataclass(frozen=True)
class Word:
    text: str


@dataclass(frozen=True)
class Based:
    """A number in another base, by its digits."""

    digits: str
    base: str


@dataclass(frozen=True)
class Ratio:
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Clock:
    """A time of day; half: am, pm or nothing."""

    hour: int
    rest: tuple[int, ...]
    half: str = ""

    @property
    def hour_of_day(self) -> int:
        return self.hour % 12 + 12 * (self.half == "pm") if self.half else self.hour


Value = (
    Quantity
    | Ordered
    | Unordered
    | Reals
    | Matrix
    | Relation
    | Named
    | Word
    | Based
    | Ratio
    | Clock
)

EMPTY = Reals(())
ALL = Reals((Interval(formulas.negate(formulas.INFINITY), formulas.INFINITY, False, False),))


def equal(one: Value, other: Value) -> bool:
    """Return whether two values are equal. Raises Unreadable where it would take too long to tell,
    or has no answer."""
    if isinstance(one, Named) or isinstance(other, Named):
        return _equal_named(one, other)
    one, other = _alone(one), _alone(other)
    match one, other:
        case Quantity(), Quantity():
            return _equal_quantities(one, other)
        case Ordered(), Ordered():
            return one.brackets == other.brackets and _equal_in_order(one.items, other.items)
        case Unordered(), Unordered():
            return _equal_in_any_order(one.items, other.items)
        case Reals(), Reals():
            return _equal_sets(one, other)
        case (Ordered() as pair, Reals() as reals) | (Reals() as reals, Ordered() as pair):
            interval = _open_interval(pair)
            return interval is not None and _equal_sets(interval, reals)
        case (Unordered() as few, Reals() as reals) | (Reals() as reals, Unordered() as few):
            points = _points(few)
            return points is not None and bool(reals.parts) and _equal_sets(points, reals)
        case Matrix(), Matrix():
            return (
                one.kind == other.kind
                and len(one.rows) == len(other.rows)
                and all(map(_equal_in_order, one.rows, other.rows))
            )
        case Relation(), Relation():
            return one.sign == other.sign and zeros.proportional(
                one.difference, other.difference, positive=one.sign in ("<", "<=")
            )
        case Ratio(), Ratio():
            return len(one.terms) == len(other.terms) and all(
                zeros.same(formulas.multiply(one.terms[0], b), formulas.multiply(other.terms[0], a))
                for a, b in zip(one.terms, other.terms, strict=True)
            )
        case (Ratio((above, below)), Quantity(term, None)) | (
            Quantity(term, None),
            Ratio((above, below)),
        ):
            return zeros.same(formulas.divide(above, below), term)
        case Clock(), Clock():
            return _equal_clocks(one, other)
    return type(one) is type(other) and one == other


def canonical(value: Value) -> str:
    """Return the value's text without units and names, which may be left out. Raises Unreadable."""
    value = _alone(value)
    match value:
        case Named():
            return canonical(value.value)
        case Quantity():
            return zeros.fingerprint(value.term)
        case Ordered():
            return f"{value.brackets[0]}{_joined(value.items)}{value.brackets[-1]}"
        case Unordered():
            return "{" + ",".join(sorted(map(canonical, value.items))) + "}"
        case Reals():
            return _canonical_set(value)
        case Matrix():
            return f"matrix{value.kind}[{';'.join(map(_joined, value.rows))}]"
        case Relation():
            return f"{zeros.shape(value.difference, signed='<' in value.sign)}{value.sign}0"
        case Ratio((above, below)):
            return zeros.fingerprint(formulas.divide(above, below))
        case Ratio():
            first = value.terms[0]
            return ":".join(zeros.fingerprint(formulas.divide(t, first)) for t in value.terms)
        case Clock():
            return ":".join(str(part) for part in (value.hour % 12, *value.rest))
        case Based():
            return f"{value.digits}_{value.base}"
        case Word():
            return value.text
    raise AssertionError(value)


def interval(low: Term, high: Term, has_low: bool, has_high: bool) -> Reals:
    """Return one interval as a set. Raises Unreadable for one that includes infinity."""
    if (has_low and formulas.is_infinite(low)) or (has_high and formulas.is_infinite(high)):
        raise Unreadable("an interval that ends with infinity")
    return Reals((Interval(low, high, has_low, has_high),))


def point(term: Term) -> Reals:
    return interval(term, term, True, True)


def union(sets: Sequence[Reals]) -> Reals:
    """Return the union as disjoint intervals from left to right. Raises Unreadable."""
    parts = [part for each in sets for part in each.parts if not _is_empty(part)]
    if len(parts) > _MOST_ITEMS:
        raise Unreadable("too many intervals")
    parts.sort(key=functools.cmp_to_key(_by_start))
    merged: list[Interval] = []
    for part in parts:
        last = merged[-1] if merged else None
        gap = _compare(last.high, part.low) if last else -1
        if last is None or gap < 0 or (gap == 0 and not (last.has_high or part.has_low)):
            merged.append(part)
            continue
        end = _compare(last.high, part.high)
        high = last.high if end >= 0 else part.high
        has_high = (end >= 0 and last.has_high) or (end <= 0 and part.has_high)
        merged[-1] = Interval(last.low, high, last.has_low, has_high)
    return Reals(tuple(merged))


def complement(reals: Reals) -> Reals:
    """Return all real numbers that are not in the set. Raises Unreadable."""
    low, has_low = ALL.parts[0].low, False
    gaps = []
    for part in union([reals]).parts:
        gaps.append(Interval(low, part.low, has_low, not part.has_low))
        low, has_low = part.high, not part.has_high
    gaps.append(Interval(low, ALL.parts[0].high, has_low, False))
    return Reals(tuple(gap for gap in gaps if not _is_empty(gap)))


def intersection(sets: Sequence[Reals]) -> Reals:
    return complement(union([complement(each) for each in sets]))


def as_set(value: Value) -> Reals:
    """Return the value as a set of numbers, to be joined by \\cup and its like. Raises
    Unreadable."""
    found: Reals | None = None
    match value:
        case Reals() as reals:
            found = reals
        case Ordered() as pair:
            found = _open_interval(pair)
        case Unordered() as few:
            found = _points(few)
        case Named(value=Reals() as reals):
            found = reals
    if found is None:
        raise Unreadable("no set of numbers")
    return found


def _alone(value: Value) -> Value:
    """The one value of a set or list of one."""
    while isinstance(value, Unordered) and len(value.items) == 1:
        value = value.items[0]
    return value


def _equal_named(one: Value, other: Value) -> bool:
    if not (isinstance(one, Named) and isinstance(other, Named)):
        if isinstance(one, Relation) or isinstance(other, Relation):
            relations = [e.relation if isinstance(e, Named) else e for e in (one, other)]
            first, second = relations
            return first is not None and second is not None and equal(first, second)
        return equal(*(each.value if isinstance(each, Named) else each for each in (one, other)))
    if one.name == other.name:
        return equal(one.value, other.value)
    if one.relation is None or other.relation is None:
        return False
    return equal(one.relation, other.relation)


def _equal_quantities(one: Quantity, other: Quantity) -> bool:
    if one.unit is None and other.unit is None:
        return zeros.same(one.term, other.term)
    if one.unit is not None and other.unit is not None:
        if one.unit.dimensions != other.unit.dimensions:
            return False
        return zeros.same(
            *(
                formulas.multiply(number(each.unit.factor), each.term)
                for each in (one, other)
                if each.unit is not None
            )
        )
    measured, bare = (one, other) if one.unit is not None else (other, one)
    assert measured.unit is not None
    factors = [number(1)]
    if measured.unit.name == PERCENT:
        factors.append(number(Fraction(1, 100)))
    if measured.unit.name == DEGREES:
        factors.append(DEGREE)
    return any(zeros.same(formulas.multiply(f, measured.term), bare.term) for f in factors)


def _equal_in_order(one: Sequence[Value], other: Sequence[Value]) -> bool:
    return len(one) == len(other) <= _MOST_ITEMS and all(map(equal, one, other))


def _equal_in_any_order(one: Sequence[Value], other: Sequence[Value]) -> bool:
    if not len(one) == len(other) <= _MOST_ITEMS:
        return False
    left = list(other)
    for value in one:
        found = next((i for i, each in enumerate(left) if equal(value, each)), None)
        if found is None:
            return False
        del left[found]
    return True


def _equal_clocks(one: Clock, other: Clock) -> bool:
    if one.rest != other.rest:
        return False
    if bool(one.half) == bool(other.half):
        return one.hour_of_day == other.hour_of_day
    plain, halved = (other, one) if one.half else (one, other)
    if 1 <= plain.hour <= 12:
        return plain.hour % 12 == halved.hour % 12
    return plain.hour == halved.hour_of_day


def _equal_sets(one: Reals, other: Reals) -> bool:
    if len(one.parts) > 1 or len(other.parts) > 1:
        one, other = union([one]), union([other])
    return len(one.parts) == len(other.parts) and all(
        (a.has_low, a.has_high) == (b.has_low, b.has_high)
        and zeros.same(a.low, b.low)
        and zeros.same(a.high, b.high)
        for a, b in zip(one.parts, other.parts, strict=True)
    )


def _open_interval(pair: Ordered) -> Reals | None:
    match pair:
        case Ordered((Quantity(low, None), Quantity(high, None)), "()"):
            return interval(low, high, False, False)
    return None


def _points(few: Unordered) -> Reals | None:
    terms = [each.term for each in few.items if isinstance(each, Quantity) and each.unit is None]
    if len(terms) < len(few.items):
        return None
    return Reals(tuple(Interval(term, term, True, True) for term in terms))


def _compare(one: Term, other: Term) -> int:
    if formulas.is_infinite(one) or formulas.is_infinite(other):
        return formulas.is_infinite(one) - formulas.is_infinite(other)
    return zeros.sign(formulas.add(one, formulas.negate(other)))


def _by_start(one: Interval, other: Interval) -> int:
    return _compare(one.low, other.low) or other.has_low - one.has_low


def _is_empty(part: Interval) -> bool:
    order = _compare(part.low, part.high)
    return order > 0 or (order == 0 and not (part.has_low and part.has_high))


def _joined(items: Sequence[Value]) -> str:
    return ",".join(map(canonical, items))


def _canonical_set(reals: Reals) -> str:
    if len(reals.parts) > 1:
        reals = union([reals])
    if all(part.low == part.high for part in reals.parts):
        points = Unordered(tuple(Quantity(part.low) for part in reals.parts))
        return canonical(points) if reals.parts else "{}"
    return " u ".join(
        f"{'(['[part.has_low]}{zeros.fingerprint(part.low)},"
        f"{zeros.fingerprint(part.high)}{')]'[part.has_high]}"
        for part in reals.parts
    )

"""Pairs of answers from grammars: equal by construction, and nearly equal, new ones in every run.

A failure prints the seed of its run; MATHS_SEED=<seed> draws the same pairs again.
"""

from __future__ import annotations

import os
import random
import secrets
from fractions import Fraction

import pytest

from megafork.answers.comparison import canonical_answer
from megafork.verifiers.maths import verify

SEED = int(os.environ.get("MATHS_SEED") or secrets.randbelow(10**9))
PAIRS = 60
"""Of each grammar, equal and nearly equal"""


class Numbers:
    """A rational number, and one beside it."""

    def __init__(self, draw):
        self.draw = draw
        below = draw.choice([1, 2, 4, 5, 8, 10, 40, 3, 6, 7, 11, 12, 10**6, 2**40])
        self.value = Fraction(draw.randint(-(10 ** draw.choice([1, 3, 9, 30])), 10**6), below)

    def near(self):
        step = self.draw.choice([Fraction(1, 10**9), Fraction(1, self.value.denominator), 1])
        other = type(self).__new__(type(self))
        other.draw, other.value = self.draw, self.value + self.draw.choice([-1, 1]) * step
        return other

    def spellings(self):
        value, draw = self.value, self.draw
        sign, size = "-" if value < 0 else "", abs(value)
        above, below = size.numerator, size.denominator
        times = draw.randint(2, 9)
        yield rf"{sign}\frac{{{above}}}{{{below}}}"
        yield rf"\dfrac{{{sign}{times * above}}}{{{times * below}}}"
        yield f"{sign}{above}/{below}"
        yield rf"{sign}\left(\frac{{{above}}}{{{below}}}\right)"
        yield rf"{sign}\frac{{1}}{{\frac{{{below}}}{{{above}}}}}" if above else "0"
        whole, rest = divmod(above, below)
        if whole and rest:
            yield rf"{sign}{whole}\frac{{{rest}}}{{{below}}}"
        if (10**60) % below == 0:
            yield from self.decimals(sign, size)
        elif (10**6 - 1) % below == 0:
            block = f"{rest * (10**6 - 1) // below:06d}"
            yield rf"{sign}{whole}.\overline{{{block}}}"
        if below == 1:
            yield f"{sign}{above:,}"
            yield f"{sign}{above:,}".replace(",", "{,}")
            yield f"{sign}{above:,}".replace(",", r"\,")

    @staticmethod
    def decimals(sign, size):
        digits = str(size.numerator * (10**60 // size.denominator)).zfill(61)
        text = f"{digits[:-60]}.{digits[-60:]}".rstrip("0").rstrip(".")
        yield sign + text
        if "." in text:
            yield f"{sign}{text}00"
            yield f"{sign}{text.removeprefix('0')}"
        whole, _, fraction = text.partition(".")
        mantissa = f"{whole}{fraction}".lstrip("0") or "0"
        yield rf"{sign}{mantissa}\times10^{{-{len(fraction)}}}" if fraction else sign + text


class Roots:
    """a + b sqrt(c), written in other ways."""

    def __init__(self, draw):
        self.draw = draw
        self.a, self.b = draw.randint(-9, 9), draw.choice([-3, -2, -1, 1, 2, 3, 7])
        self.c = draw.choice([2, 3, 5, 6, 7, 10, 11])

    def near(self):
        other = type(self)(self.draw)
        other.a, other.b, other.c = self.a, self.b, self.c
        name = self.draw.choice("abc")
        setattr(other, name, {"a": self.a + 1, "b": -self.b, "c": self.c + 8}[name])
        return other

    def spellings(self):
        a, b, c = self.a, self.b, self.c
        sign = "-" if b < 0 else "+"
        yield rf"{a}{sign}{abs(b)}\sqrt{{{c}}}"
        yield rf"{b}\sqrt{{{c}}}+{a}" if a >= 0 else rf"{b}\sqrt{{{c}}}-{-a}"
        yield rf"{a}{sign}\sqrt{{{b * b * c}}}"
        yield rf"{a}{sign}\frac{{{abs(b) * c}}}{{\sqrt{{{c}}}}}"
        yield rf"\frac{{{a * a - b * b * c}}}{{{a}{'+' if b < 0 else '-'}{abs(b)}\sqrt{{{c}}}}}"
        yield rf"{a}{sign}{abs(b)}\cdot{c}^{{1/2}}"


class Polynomials:
    """(x - r)(x - s), and expanded."""

    def __init__(self, draw):
        self.draw = draw
        self.r, self.s, self.k = (draw.randint(1, 9) for _ in range(3))

    def near(self):
        other = type(self)(self.draw)
        other.r, other.s, other.k = self.r + 10, self.s, self.k
        return other

    def spellings(self):
        r, s, k = self.r, self.s, self.k
        yield f"{k}(x-{r})(x-{s})"
        yield f"{k}(x-{s})(x-{r})"
        yield f"{k}x^2-{k * (r + s)}x+{k * r * s}"
        yield f"{k * r * s}-{k * (r + s)}x+{k}x^{{2}}"
        yield rf"\frac{{{2 * k}(x-{r})(x-{s})^2}}{{2(x-{s})}}"


class Collections:
    """Numbers in a list, a tuple or a matrix: `near` has another one among them."""

    def __init__(self, draw, items=None):
        self.draw = draw
        self.items = items or self.different(draw)

    @staticmethod
    def different(draw):
        values = {}
        while len(values) < 3:
            number = Numbers(draw)
            values[number.value] = number
        return list(values.values())

    def near(self):
        items = list(self.items)
        place = self.draw.randrange(3)
        items[place] = items[place].near()
        return type(self)(self.draw, items)

    def written(self):
        """Without thousands, which commas make ambiguous here."""
        found = []
        for item in self.items:
            found.append(self.draw.choice([s for s in item.spellings() if "," not in s]))
        return found


class Lists(Collections):
    def spellings(self):
        for form in (
            "{}, {}, {}",
            r"\{{{}, {}, {}\}}",
            r"{}, {}\text{{ and }}{}",
            "x={}, x={}, x={}",
        ):
            items = self.written()
            self.draw.shuffle(items)
            yield form.format(*items)


class Tuples(Collections):
    def near(self):
        if self.draw.random() < 0.5:
            return super().near()
        return type(self)(self.draw, self.items[1:] + self.items[:1])

    def spellings(self):
        for form in (
            "({},{},{})",
            r"\left({},\,{},\,{}\right)",
            "({}, {}, {})",
            "(x,y,z)=({},{},{})",
        ):
            yield form.format(*self.written())


class Matrices(Tuples):
    def spellings(self):
        for kind in ("pmatrix", "bmatrix"):
            a, b, c = self.written()
            yield rf"\begin{{{kind}}}{a}&{b}\\{c}&0\end{{{kind}}}"
            yield rf"\begin{{{kind}}} {a} & {b} \\[4pt] {c} & 0 \\ \end{{{kind}}}"
            yield rf"\left[\begin{{array}}{{cc}}{a}&{b}\\{c}&0\end{{array}}\right]"


class Intervals:
    """With ends that are in it or not, as an interval or an inequality."""

    def __init__(self, draw):
        self.draw = draw
        self.ends = sorted((Numbers(draw) for _ in range(2)), key=lambda number: number.value)
        while self.ends[0].value == self.ends[1].value:
            self.ends[1].value += 1
        self.closed = [draw.random() < 0.5, draw.random() < 0.5]

    def near(self):
        other = type(self)(self.draw)
        other.ends, other.closed = list(self.ends), list(self.closed)
        side = self.draw.randrange(2)
        if self.draw.random() < 0.5:
            other.closed[side] = not self.closed[side]
        else:
            other.ends[side] = Numbers(self.draw)
            other.ends[side].value = self.ends[side].value + (2 * side - 1) * Fraction(1, 10**9)
        return other

    def spellings(self):
        low, high = (
            self.draw.choice([s for s in end.spellings() if "," not in s]) for end in self.ends
        )
        left, right = "(["[self.closed[0]], ")]"[self.closed[1]]
        less = [r"\le" if closed else "<" for closed in self.closed]
        more = [r"\geq" if closed else ">" for closed in self.closed]
        yield f"{left}{low}, {high}{right}"
        yield rf"\left{left}{low},\,{high}\right{right}"
        yield rf"x\in{left}{low}, {high}{right}"
        yield f"{low}{less[0]} x{less[1]} {high}"
        yield f"{high}{more[1]} x{more[0]} {low}"


GRAMMARS = [Numbers, Roots, Polynomials, Lists, Tuples, Matrices, Intervals]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_what_a_grammar_makes_is_judged_as_it_was_made(grammar):
    print(f"MATHS_SEED={SEED}")
    draw = random.Random(f"{SEED} {grammar.__name__}")
    for _ in range(PAIRS):
        made = grammar(draw)
        gold, found, nearly = (
            draw.choice(list(one.spellings())) for one in (made, made, made.near())
        )
        told = f"MATHS_SEED={SEED}: {gold!r}, {found!r}, {nearly!r}"
        assert verify("", f"\\boxed{{{found}}}", gold) == 1.0, told
        assert verify("", f"\\boxed{{{nearly}}}", gold) == 0.0, told
        assert verify("", f"\\boxed{{{gold}}}", nearly) == 0.0, told
        assert canonical_answer(found) == canonical_answer(gold) != canonical_answer(nearly), told

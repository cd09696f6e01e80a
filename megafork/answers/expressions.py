r"""Marks and brackets (latex.py) as a formula: sums, products, fractions, powers, roots, functions.

What two readers could take for different numbers is Unreadable: `1/2x`, `\sqrt12`, `2\frac{3}{2}`,
`\sin x/2`, `2 3`.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TypeGuard

from megafork.answers import formulas
from megafork.answers.formulas import DEGREE, FUNCTIONS, Term, Unreadable, number, symbol
from megafork.answers.latex import Group, Mark, Node, Nodes, spelled

_GREEK = frozenset(
    f"\\{name}"
    for name in [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
        "ell",
    ]
)
_DECORATIONS = frozenset(
    f"\\{name}"
    for name in ["overline", "vec", "hat", "bar", "tilde", "overrightarrow", "widehat", "angle"]
)
_TIMES = ("\\cdot", "\\times", "*")
_OVER = ("/", "\\div")
_DEGREES = ("\\circ", "\\degree")
_INVERSES = {"\\sin": "arcsin", "\\cos": "arccos", "\\tan": "arctan"}
_LOG_BASE = symbol("\\log's base")
"""A logarithm without a base: ten, two or e, as the reader likes; we do not choose"""


def expression(nodes: Nodes) -> Term:
    """Return the formula that the nodes spell. Raises Unreadable."""
    reader = _Reader(nodes)
    term = reader.sum()
    if reader.next is not None:
        raise Unreadable(f"{spelled([reader.next])} in a formula")
    return term


def is_sign(node: Node | None, *texts: str) -> TypeGuard[Mark]:
    return isinstance(node, Mark) and node.text in texts and node.kind in ("sign", "command")


def is_number(node: Node | None) -> TypeGuard[Mark]:
    return isinstance(node, Mark) and node.kind == "number"


class _Reader:
    """Recursive descent; each method reads on from `at`."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes, self.at = nodes, 0
        self.bars = 0
        """How many |...| are open"""
        self.leftover = False
        """An argument without braces took the first digit of several"""
        self.is_open = False
        """The last factor was a function without brackets, so that what follows may belong to it"""

    @property
    def next(self) -> Node | None:
        return self.nodes[self.at] if self.at < len(self.nodes) else None

    def take(self) -> Node:
        node = self.next
        if node is None:
            raise Unreadable("the formula ends too early")
        self.at += 1
        return node

    def sum(self) -> Term:
        terms = [self.signed(self.product)]
        while is_sign(self.next, "+", "-"):
            terms.append(self.signed(self.product))
        return formulas.add(*terms)

    def signed(self, read: Callable[[], Term]) -> Term:
        if not is_sign(self.next, "+", "-"):
            return read()
        is_minus = is_sign(self.take(), "-")
        return formulas.negate(read()) if is_minus else read()

    def product(self) -> Term:
        term = self.adjacent()
        while is_sign(self.next, *_TIMES, *_OVER):
            is_quotient = is_sign(self.take(), *_OVER)
            if not is_quotient:
                term = formulas.multiply(term, self.signed(self.adjacent))
                continue
            if self.is_open:
                raise Unreadable("a function without brackets before a slash")
            term = formulas.divide(term, self.signed(self.factor))
            if self.begins_factor():
                raise Unreadable("a slash before a product")
        return term

    def adjacent(self, *, of_function: bool = False) -> Term:
        """Factors without a sign between them."""
        factors = [self.factor()]
        while self.begins_factor():
            if _are_digits_in_braces(self.next):
                raise Unreadable("digits in braces after a factor")
            if is_number(self.next) or (of_function and self.is_function(self.next)):
                break
            factors.append(self.factor())
        if is_number(self.next):
            raise Unreadable("a number after a factor")
        return formulas.multiply(*factors)

    def begins_factor(self) -> bool:
        node = self.next
        if isinstance(node, Group):
            return True
        if node is None or node.kind in ("text", "row"):
            return False
        if node.kind == "sign":
            return node.text == "|" and not self.bars
        return not is_sign(node, *_TIMES, *_OVER, *_DEGREES)

    @staticmethod
    def is_function(node: Node | None) -> bool:
        return isinstance(node, Mark) and (
            node.text[1:] in FUNCTIONS or node.text in ("\\log", "\\lg", "\\exp")
        )

    def factor(self) -> Term:
        self.is_open = False
        start = self.next
        term = self.base()
        if self.leftover:
            raise Unreadable("digits after an argument without braces")
        while True:
            node = self.next
            if is_sign(node, "!"):
                self.take()
                if is_sign(self.next, "!"):
                    raise Unreadable("a double factorial")
                term = formulas.factorial(term)
            elif is_sign(node, "^"):
                if self.is_open:
                    raise Unreadable("a power of a function without brackets")
                self.take()
                term = self.raised(term)
                if is_sign(self.next, "^"):
                    raise Unreadable("a power of a power without brackets")
            elif is_sign(node, *_DEGREES):
                self.take()
                term = formulas.multiply(term, DEGREE)
            elif is_sign(node, "\\%", "%"):
                self.take()
                term = formulas.multiply(term, number(Fraction(1, 100)))
            elif is_sign(node, "_", "'"):
                raise Unreadable(f"an index of {spelled([start] if start else [])}")
            else:
                return term

    def raised(self, base: Term) -> Term:
        node = self.take()
        if isinstance(node, Group):
            if len(node.inner) == 1 and is_sign(node.inner[0], *_DEGREES):
                return formulas.multiply(base, DEGREE)
            return formulas.power(base, expression(node.inner))
        if is_sign(node, *_DEGREES):
            return formulas.multiply(base, DEGREE)
        if is_sign(node, "-") and is_number(self.next):
            return formulas.power(base, formulas.negate(self.plain(self.take())))
        return formulas.power(base, self.plain(node))

    @staticmethod
    def plain(node: Node) -> Term:
        """A single mark."""
        if isinstance(node, Mark) and node.kind == "number":
            return number(node.value)
        if isinstance(node, Mark) and (node.kind == "letter" or node.text in (*_GREEK, "\\pi")):
            return symbol(node.text)
        raise Unreadable(f"{spelled([node])} as an exponent")

    def base(self) -> Term:
        node = self.take()
        if isinstance(node, Group):
            return self.bracketed(node)
        match node.kind:
            case "number":
                return self.mixed(node)
            case "letter":
                return self.named(node.text)
            case "name" if node.text.isupper():
                return self.named(node.text)
            case "command":
                return self.command(node.text)
        if is_sign(node, "|") and not self.bars:
            self.bars += 1
            term = self.sum()
            self.bars -= 1
            if not is_sign(self.take(), "|"):
                raise Unreadable("| is not closed")
            return formulas.call("abs", term)
        raise Unreadable(f"{node.text} in a formula")

    @staticmethod
    def bracketed(group: Group) -> Term:
        if group.opener in ("\\lfloor", "\\lceil"):
            return formulas.call(group.opener[2:], expression(group.inner))
        if (group.opener, group.closer) not in (("{", "}"), ("(", ")"), ("[", "]")):
            raise Unreadable(f"{group.opener} in a formula")
        return expression(group.inner)

    def mixed(self, whole: Mark) -> Term:
        """A number, or a whole one with the fraction that follows it."""
        part = None
        after = self.nodes[self.at : self.at + 3]
        if is_sign(self.next, "\\frac"):
            start = self.at
            self.take()
            above, below = self.argument(), self.argument()
            if above.kind == below.kind == "number":
                part = above.value / below.value if below.value else None
                if not _is_proper(above.value, below.value) or not whole.text.isdigit():
                    raise Unreadable("a product, or a mixed number?")
            else:
                self.at, self.leftover = start, False
        elif len(after) == 3 and is_number(after[0]) and is_sign(after[1], "/"):
            above_mark, _, below_mark = after
            if is_number(below_mark) and above_mark.spaced:
                above, below = self.plain(above_mark), self.plain(below_mark)
                if not _is_proper(above.value, below.value) or not whole.text.isdigit():
                    raise Unreadable("a product, or a mixed number?")
                part, self.at = above.value / below.value, self.at + 3
        if part is None:
            return number(whole.value)
        if is_sign(self.next, "^", "!"):
            raise Unreadable("a power of a mixed number without brackets")
        return number(whole.value + part)

    def named(self, name: str) -> Term:
        """A variable with its index and primes; e and i alone are the constants."""
        while is_sign(self.next, "_", "'"):
            if is_sign(self.take(), "'"):
                name += "'"
                continue
            index = self.take()
            name += "_" + spelled(index.inner if isinstance(index, Group) else [index])
        if name.strip("'") in ("f", "g") and isinstance(self.next, Group):
            raise Unreadable("a function that is not known")
        return symbol(name)

    def argument(self) -> Term:
        """Read an argument of \\frac or \\sqrt: a group in braces, one mark, or the first digit of
        a number."""
        if self.leftover:
            node, self.leftover = self.nodes[self.at - 1], False
            assert isinstance(node, Mark)
            digit, rest = node.text[1], node.text[2:]
            if rest:
                raise Unreadable("digits after an argument without braces")
            return number(int(digit))
        node = self.take()
        if isinstance(node, Mark) and node.kind == "number":
            if not node.text.isdigit():
                raise Unreadable("a decimal as an argument without braces")
            self.leftover = len(node.text) > 1
            return number(int(node.text[0]))
        if isinstance(node, Group):
            if node.opener != "{":
                raise Unreadable("an argument in round brackets")
            return expression(node.inner)
        if node.kind == "command":
            return self.command(node.text)
        return self.plain(node)

    def command(self, name: str) -> Term:
        if name in _GREEK or name in ("\\pi", "\\infty"):
            return self.named(name)
        if name in _DECORATIONS:
            return self.named(f"{name} {spelled([self.take()])}")
        match name:
            case "\\frac":
                return formulas.divide(self.argument(), self.argument())
            case "\\binom":
                return formulas.binomial(self.argument(), self.argument())
            case "\\sqrt":
                return self.root()
            case "\\log" | "\\lg":
                return self.logarithm()
            case "\\exp":
                return formulas.power(symbol("e"), self.of_function())
        if name[1:] in FUNCTIONS:
            return self.function(name)
        raise Unreadable(f"{name} in a formula")

    def root(self) -> Term:
        index = 2
        node = self.next
        if isinstance(node, Group) and node.opener == "[":
            self.take()
            degree = expression(node.inner)
            if degree.kind != "number" or degree.value.denominator != 1:
                raise Unreadable("a root of that kind")
            index = degree.value.numerator
        node = self.next
        if isinstance(node, Group) and node.opener == "(":
            self.take()
            return formulas.root(index, self.bracketed(node))
        return formulas.root(index, self.argument())

    def function(self, name: str) -> Term:
        if not is_sign(self.next, "^"):
            return formulas.call(name[1:], self.of_function())
        self.take()
        exponent = self.exponent()
        if exponent == number(-1) and name in _INVERSES:
            return formulas.call(_INVERSES[name], self.of_function())
        if exponent.kind != "number" or exponent.value < 1:
            raise Unreadable(f"{name} to that power")
        return formulas.power(formulas.call(name[1:], self.of_function()), exponent)

    def exponent(self) -> Term:
        node = self.take()
        if isinstance(node, Group):
            return expression(node.inner)
        return self.plain(node)

    def logarithm(self) -> Term:
        base = _LOG_BASE
        if is_sign(self.next, "_"):
            self.take()
            base = self.exponent()
        exponent = None
        if is_sign(self.next, "^"):
            self.take()
            exponent = self.exponent()
        below = base if base is _LOG_BASE else formulas.call("ln", base)
        value = formulas.divide(formulas.call("ln", self.of_function()), below)
        return value if exponent is None else formulas.power(value, exponent)

    def of_function(self) -> Term:
        """Brackets, or the factors up to the next sign or function."""
        node = self.next
        if isinstance(node, Group) and node.opener in "({[":
            self.take()
            term = self.bracketed(node)
            self.is_open = is_sign(self.next, "^")
            return term
        term = self.adjacent(of_function=True)
        self.is_open = True
        return term


def _are_digits_in_braces(node: Node | None) -> bool:
    if not isinstance(node, Group) or node.opener != "{" or not node.inner:
        return False
    return is_number(node.inner[0])


def _is_proper(above: Fraction, below: Fraction) -> bool:
    return above.denominator == below.denominator == 1 and 0 < above < below

r"""Marks and brackets (latex.py) as a value (values.py): lists, sets, intervals, relations.

From the outside to the inside: `and`, `or` and commas part a list; `=`, `<` and `\in` part what is
said of a variable; `\cup` parts sets; brackets tell tuples from intervals; the rest is a number
with its unit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from megafork.answers import formulas, zeros
from megafork.answers.expressions import expression, is_sign
from megafork.answers.formulas import Unreadable
from megafork.answers.latex import Group, Mark, Node, Nodes, spelled, to_latex, tree
from megafork.answers.quantities import OF_ANGLES, based, flat, quantity, ratio, split
from megafork.answers.units import NUMBER_WORDS
from megafork.answers.values import (
    ALL,
    EMPTY,
    Matrix,
    Named,
    Ordered,
    Quantity,
    Reals,
    Relation,
    Unordered,
    Value,
    Word,
    as_set,
    complement,
    intersection,
    interval,
    union,
)

_NO_NAMES = ("\\pi", "\\infty", "\\circ", "\\degree", "\\cdot", "\\times", "!", "\\%", "\\$")
_REALS = ("\\mathbb { R }", "\\mathbb R", "\\reals")
_RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!="}
_TURNED = {"=": "=", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NO_SOLUTION = frozenset(("no solution", "no solutions", "empty set", "null set"))
_STRUCTURE = frozenset(("\\frac", "\\sqrt", "\\binom", *OF_ANGLES))
_IN_TEXT = re.compile(
    r"\\(?:text[a-z]*|mbox|mathrm|mathbf|mathit|operatorname|boldsymbol)\s*\{([^{}\\]*)\}"
)
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'-])*")
_CHOICE = re.compile(r"\(?([A-Z])(?:\)|\.|\)\.)?")
_PRODUCT = re.compile(r"[xyz]{2,3}|(?!no|on|is|at|so|up)[a-z]{2}|[a-zA-Z]|pi|inf(?:ty)?")


def read(text: str) -> Value:
    """Return the value of an answer. Raises Unreadable."""
    text = to_latex(text)
    return _words(text) or _answer(tree(text))


def _words(text: str) -> Value | None:
    """An answer in words: a number, a choice, no solution, or the words themselves."""
    plain = " ".join(_IN_TEXT.sub(r" \1 ", text).replace("~", " ").split())
    if choice := _CHOICE.fullmatch(plain):
        return Quantity(formulas.symbol(choice[1]))
    plain = plain.rstrip(" .")
    if not _WORDS.fullmatch(plain) or _PRODUCT.fullmatch(plain):
        return None
    lowered = plain.lower().removeprefix("the ")
    if lowered.replace(" ", "-") in NUMBER_WORDS:
        return Quantity(formulas.number(NUMBER_WORDS[lowered.replace(" ", "-")]))
    if "-" in plain and all(len(part) < 4 for part in re.split("[ -]", plain)):
        return None
    if lowered == "infinity":
        return Quantity(formulas.INFINITY)
    if lowered in _NO_SOLUTION:
        return EMPTY
    return Word(plain if len(plain) < 3 else lowered)


# --------------------------------------------------------------------------------- lists


def _answer(nodes: Nodes) -> Value:
    if len(nodes) == 1 and isinstance(nodes[0], Group) and nodes[0].opener == "{":
        return _answer(nodes[0].inner)
    parts, joints = split(nodes, _is_joint)
    if len(parts) == 1:
        return _item(parts[0])
    items = [_item(part) for part in parts]
    if all(joint == "or" for joint in joints) and all(map(_is_named_set, items)):
        return _named_union(items)
    if any(_has_leading_zero(part) for part in parts):
        raise Unreadable("a list, or a number with commas?")
    return _listed(items)


def _listed(items: Sequence[Value]) -> Value:
    flat: list[Value] = []
    for item in items:
        flat += item.items if isinstance(item, Unordered) else [item]
    names = [item.name for item in flat if isinstance(item, Named)]
    if len(names) == len(flat) and len(set(names)) == len(names) > 1:
        return _assigned([item for item in flat if isinstance(item, Named)])
    return Unordered(tuple(flat))


def _assigned(items: list[Named]) -> Value:
    """x = 1, y = 2; of x_1 = 1, x_2 = 2 the values alone."""
    if len({item.name.partition(" _ ")[0] for item in items}) == 1:
        return Unordered(tuple(item.value for item in items))
    items.sort(key=lambda item: item.name)
    names = ",".join(item.name for item in items)
    return Ordered(tuple(item.value for item in items), f" {names} ")


def _is_joint(node: Node) -> str | None:
    if is_sign(node, ",", ";"):
        return ","
    if is_sign(node, "\\lor") or (isinstance(node, Mark) and node.text in ("or", ", or")):
        return "or"
    if is_sign(node, "\\land") or (isinstance(node, Mark) and node.text == "and"):
        return "and"
    return None


def _has_leading_zero(nodes: Nodes) -> bool:
    first = nodes[0]
    return isinstance(first, Mark) and re.match(r"0\d", first.text) is not None


def _is_named_set(value: Value) -> bool:
    return isinstance(value, Named) and isinstance(value.value, Reals)


def _named_union(items: Sequence[Value]) -> Value:
    names = {item.name for item in items if isinstance(item, Named)}
    if len(names) > 1:
        raise Unreadable("inequalities of several variables")
    return Named(names.pop(), union([as_set(item) for item in items]))


# -------------------------------------------------------------------------- what is said


def _item(nodes: Nodes) -> Value:
    if signs := _count(nodes, "\\pm") + _count(nodes, "\\mp"):
        if signs > 1 and (_count(nodes, "\\pm"), _count(nodes, "\\mp")) != (1, 1):
            raise Unreadable("several signs that can be plus or minus")
        above = _item(_replaced(nodes, {"\\pm": "+", "\\mp": "-"}))
        below = _item(_replaced(nodes, {"\\pm": "-", "\\mp": "+"}))
        return _listed([above, below])
    for at, node in enumerate(nodes):
        if is_sign(node, "\\in"):
            return Named(_name(nodes[:at]), as_set(_value(nodes[at + 1 :])))
    parts, signs_between = split(nodes, _relation_of)
    if len(parts) == 1:
        return _value(nodes)
    if set(signs_between) == {"="}:
        return _equation(parts)
    return _inequality(parts, signs_between)


def _relation_of(node: Node) -> str | None:
    return _RELATIONS[node.text] if is_sign(node, *_RELATIONS) else None


def _count(nodes: Nodes, text: str) -> int:
    return sum(
        _count(node.inner, text) if isinstance(node, Group) else is_sign(node, text)
        for node in nodes
    )


def _replaced(nodes: Nodes, by: dict[str, str]) -> tuple[Node, ...]:
    return tuple(
        Group(node.opener, node.closer, _replaced(node.inner, by), node.spaced)
        if isinstance(node, Group)
        else (Mark("sign", by[node.text], node.spaced) if is_sign(node, *by) else node)
        for node in nodes
    )


def _equation(parts: Sequence[Nodes]) -> Value:
    """name = value, a chain of equal numbers, or an equation."""
    if len(parts) == 2:
        for named, other in (parts, parts[::-1]):
            if _is_name(named):
                return Named(_name(named), _value(other), _difference("=", *parts))
    start = 1 if _is_name(parts[0]) else 0
    values = [_value(part) for part in parts[start:]]
    terms = [value.term for value in values if isinstance(value, Quantity)]
    if len(terms) == len(values) > 1 and not any(map(formulas.variables, terms)):
        if not all(zeros.same(terms[0], term) for term in terms):
            raise Unreadable("an equation that is wrong")
        return Named(_name(parts[0]), values[-1]) if start else values[-1]
    if len(parts) > 2:
        raise Unreadable("several equations")
    relation = _difference("=", *parts)
    if relation is None:
        raise Unreadable("an equation of what are no numbers")
    return relation


def _is_name(nodes: Nodes) -> bool:
    """A variable, f(x), a text, \\angle ABC; or a formula of several variables without a number."""
    marks = flat(nodes)
    if any(mark.kind == "number" or (is_sign(mark, ",") and len(nodes) > 1) for mark in marks):
        return False
    named = [mark.text for mark in marks if mark.kind in ("letter", "name")]
    letters = set(named)
    if len(named) > len(letters):  # x x = 2
        return False
    if letters <= {"e", "i"} and not any(mark.kind in ("text", "command") for mark in marks):
        return False
    is_formula = any(is_sign(mark, "+", "-", "/", "*", "^", *_STRUCTURE) for mark in marks)
    if is_formula:
        return len(letters) > 1 and not is_sign(nodes[0], "-")
    return not any(is_sign(mark, *_NO_NAMES) for mark in marks)


def _name(nodes: Nodes) -> str:
    if not _is_name(nodes):
        raise Unreadable("no name")
    return spelled(nodes)


def _difference(sign: str, left: Nodes, right: Nodes) -> Relation | None:
    try:
        difference = formulas.add(expression(left), formulas.negate(expression(right)))
    except Unreadable:
        return None
    if sign in (">", ">="):
        return Relation(_TURNED[sign], formulas.negate(difference))
    return Relation(sign, difference)


def _inequality(parts: Sequence[Nodes], signs: Sequence[str]) -> Value:
    """Return the variable and its set of numbers where the inequality bounds one, else the
    relation."""
    relation = _difference(signs[0], *parts) if len(parts) == 2 else None
    at = next((i for i, part in enumerate(parts) if _is_name(part) and len(part) == 1), None)
    if at is None or (len(parts) == 3) != (at == 1 and len(parts) == 3) or len(parts) > 3:
        if relation is None:
            raise Unreadable("an inequality of that shape")
        return relation
    try:
        sets = []
        for i, part in enumerate(parts):
            if i != at:
                sign = signs[0] if i < at else signs[at]
                sets.append(_beyond(expression(part), _TURNED[sign] if i < at else sign))
        return Named(_name(parts[at]), intersection(sets) if len(sets) > 1 else sets[0], relation)
    except Unreadable:
        if relation is None:
            raise
        return relation


def _beyond(bound: formulas.Term, sign: str) -> Reals:
    """Return the set of all x with x `sign` bound. Raises Unreadable for a bound that is no real
    number."""
    zeros.sign(bound)
    minus, plus = ALL.parts[0].low, ALL.parts[0].high
    match sign:
        case "<" | "<=":
            return interval(minus, bound, False, sign == "<=")
        case ">" | ">=":
            return interval(bound, plus, sign == ">=", False)
        case "!=":
            return complement(interval(bound, bound, True, True))
    raise Unreadable("an equation among inequalities")


# ------------------------------------------------------------------------ sets and tuples


def _value(nodes: Nodes) -> Value:
    if not nodes:
        raise Unreadable("nothing")
    for sign in ("\\setminus", "\\cup", "\\cap"):
        parts, joints = split(nodes, functools.partial(_if_sign, sign))
        if joints:
            return _combined(sign, [as_set(_value(part)) for part in parts])
    if special := _special(nodes):
        return special
    if len(nodes) == 1 and isinstance(nodes[0], Group):
        group = nodes[0]
        if group.opener.startswith("env:"):
            return _matrix(group)
        if group.opener == "\\{":
            return _set(group.inner)
        inner = group.inner
        if group.opener in "([" and any(is_sign(node, ",", ";") for node in inner):
            return _tuple(group)
        if len(inner) == 1 and isinstance(inner[0], Group):
            return _value(inner)
    return _scaled(nodes) or based(nodes) or ratio(nodes) or quantity(nodes)


def _if_sign(sign: str, node: Node) -> str | None:
    return sign if is_sign(node, sign) else None


def _combined(sign: str, sets: list[Reals]) -> Reals:
    if sign == "\\cup":
        return union(sets)
    if sign == "\\cap":
        return intersection(sets)
    return intersection([sets[0], *map(complement, sets[1:])])


def _special(nodes: Nodes) -> Value | None:
    match spelled(nodes):
        case "\\emptyset" | "\\{  \\}":
            return EMPTY
        case text if text in _REALS:
            return ALL
    return None


def _set(inner: Nodes) -> Value:
    for at, node in enumerate(inner):
        if is_sign(node, "|", "\\mid", ":"):
            condition = _answer(inner[at + 1 :])
            if not isinstance(condition, Named) or spelled(inner[:at]) not in (
                condition.name,
                *(f"{condition.name} \\in {reals}" for reals in _REALS),
            ):
                raise Unreadable("a set by a condition")
            return as_set(condition)
    value = _answer(inner)
    items = value.items if isinstance(value, Unordered) else (value,)
    if any(isinstance(item, Reals | Unordered) for item in items):
        raise Unreadable("a set of sets")
    return Unordered(items)


def _tuple(group: Group) -> Value:
    parts, _ = split(group.inner, lambda node: "," if is_sign(node, ",", ";") else None)
    if any(map(_has_leading_zero, parts)):
        raise Unreadable("a tuple, or a number with commas?")
    items = tuple(_item(part) for part in parts)
    brackets = group.opener + group.closer
    if len(items) == 2 and all(isinstance(item, Quantity) for item in items):
        low, high = (item.term for item in items if isinstance(item, Quantity))
        if any(map(formulas.is_infinite, (low, high))) or brackets != "()":
            return interval(low, high, group.opener == "[", group.closer == "]")
    if brackets in ("(]", "[)"):
        raise Unreadable(f"{brackets} around what is no interval")
    return Ordered(items, brackets)


def _matrix(group: Group) -> Value:
    rows: list[list[Nodes]] = [[]]
    cell: list[Node] = []
    for node in (*group.inner, Mark("row", "\\\\")):
        if is_sign(node, "&"):
            rows[-1].append(cell)
            cell = []
        elif isinstance(node, Mark) and node.kind == "row":
            if cell or rows[-1]:
                rows[-1].append(cell)
                rows.append([])
            cell = []
        else:
            cell.append(node)
    kind = group.opener.removeprefix("env:")
    values = tuple(tuple(_item(cell) for cell in row) for row in rows if row)
    if not values:
        raise Unreadable("an empty matrix")
    if kind == "cases" and all(len(row) == 1 for row in values):
        return _listed([row[0] for row in values])
    return Matrix(values, kind)


def _scaled(nodes: Nodes) -> Value | None:
    """A number times a matrix."""
    last = nodes[-1]
    if len(nodes) == 1 or not isinstance(last, Group):
        return None
    inner = last.inner[0] if len(last.inner) == 1 and last.opener in "([" else last
    if not isinstance(inner, Group) or inner.opener != "env:":
        return None
    minus = len(nodes) == 2 and is_sign(nodes[0], "-")
    factor = formulas.number(-1) if minus else expression(nodes[:-1])
    matrix = _matrix(inner)
    assert isinstance(matrix, Matrix)
    rows = []
    for row in matrix.rows:
        cells = [cell for cell in row if isinstance(cell, Quantity) and cell.unit is None]
        if len(cells) < len(row):
            raise Unreadable("a number times what is no matrix of numbers")
        rows.append(tuple(Quantity(formulas.multiply(factor, cell.term)) for cell in cells))
    return Matrix(tuple(rows))

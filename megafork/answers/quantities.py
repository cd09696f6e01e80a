"""Numbers as they stand in answers: with a unit, in another base, as a ratio or a time of day."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megafork.answers import formulas
from megafork.answers.expressions import expression, is_number, is_sign
from megafork.answers.formulas import Unreadable
from megafork.answers.latex import Group, Mark, Node, Nodes, spelled
from megafork.answers.units import DEGREE, NUMBER_WORDS, PERCENT, is_known, unit_of
from megafork.answers.values import Based, Clock, Quantity, Ratio, Value

_APART = ("+", "-", "\\cdot", "\\times", "/")
OF_ANGLES = tuple(f"\\{name}" for name in formulas.FUNCTIONS)


def split(nodes: Nodes, joint_of: Callable[[Node], str | None]) -> tuple[list[Nodes], list[str]]:
    """The parts, none of them empty, and what stands between them; `, and` is one joint."""
    parts: list[Nodes] = []
    joints: list[str] = []
    start = 0
    for at, node in enumerate(nodes):
        joint = joint_of(node)
        if joint is None:
            continue
        if at == start:
            if not joints or joints[-1] != "," or joint not in ("and", "or"):
                raise Unreadable("a list with a gap")
            joints[-1] = joint
        else:
            parts.append(nodes[start:at])
            joints.append(joint)
        start = at + 1
    if start == len(nodes):
        raise Unreadable("nothing at the end of a list")
    return [*parts, nodes[start:]], joints


def flat(nodes: Nodes) -> list[Mark]:
    """Return all marks, those inside groups too, but for those of an index."""
    marks: list[Mark] = []
    for at, node in enumerate(nodes):
        if at and is_sign(nodes[at - 1], "_"):
            continue
        marks += flat(node.inner) if isinstance(node, Group) else [node]
    return marks


def based(nodes: Nodes) -> Value | None:
    """Return a number in another base, such as 1011_2; None where the nodes are none."""
    if len(nodes) < 3 or not is_sign(nodes[-2], "_"):
        return None
    digits = "".join(map(spelled_as_written, nodes[:-2])).upper()
    base = spelled_as_written(nodes[-1]).lower()
    base = str(NUMBER_WORDS.get(base, base))
    if not re.fullmatch("[0-9][0-9A-F]*", digits) or not re.fullmatch("[1-9][0-9]?", base):
        return None
    if any(int(digit, 16) >= int(base) for digit in digits):
        raise Unreadable("digits that the base does not have")
    return Based(digits.lstrip("0") or "0", base)


def spelled_as_written(node: Node) -> str:
    if isinstance(node, Group):
        return "".join(map(spelled_as_written, node.inner))
    return node.text


def ratio(nodes: Nodes) -> Value | None:
    half = ""
    if isinstance(nodes[-1], Mark) and nodes[-1].kind in ("text", "name", "letter"):
        ending = "".join(n.text for n in nodes if isinstance(n, Mark) and n.kind != "number")
        half = re.sub("[^apm]", "", ending.lower()) if ":" in ending else ""
        if half:
            while isinstance(nodes[-1], Mark) and nodes[-1].kind in ("text", "name", "letter"):
                nodes = nodes[:-1]
    if not any(is_sign(node, ":") for node in nodes):
        return None
    parts, _ = split(nodes, lambda node: ":" if is_sign(node, ":") else None)
    written = [spelled_as_written(part[0]) if len(part) == 1 else "" for part in parts]
    if _is_time(written) and half in ("", "am", "pm"):
        return Clock(int(written[0]), tuple(map(int, written[1:])), half)
    if half:
        raise Unreadable("a time of day that there is not")
    return Ratio(tuple(expression(part) for part in parts))


def _is_time(written: Sequence[str]) -> bool:
    hour, *rest = written
    return (
        len(rest) in (1, 2)
        and re.fullmatch(r"\d{1,2}", hour) is not None
        and int(hour) <= 24
        and all(re.fullmatch(r"[0-5]\d", part) is not None for part in rest)
    )


def quantity(given: Nodes) -> Value:
    """Return a number with its unit."""
    nodes = list(given)
    signs: list[Node] = []
    while nodes and is_sign(nodes[0], "-", "+") and not signs:
        signs.append(nodes[0])
        nodes = nodes[1:]
    words: list[tuple[str, int]] = []
    if nodes and is_sign(nodes[0], "\\$", "\\pounds", "\\euro"):
        words.append(({"\\$": "dollar"}.get(_text(nodes[0]), _text(nodes[0])[1:]), 1))
        nodes = nodes[1:]
    if signs and nodes and is_sign(nodes[0], "-", "+"):
        raise Unreadable("two signs")
    nodes = [*signs, *nodes]
    start = next((at for at in range(1, len(nodes)) if _begins_unit(nodes, at)), len(nodes))
    number, marked = _marked(nodes[:start])
    unit, factor = unit_of([*words, *marked, *_unit_words(nodes[start:])])
    term = formulas.multiply(formulas.number(factor), expression(number))
    return Quantity(term, unit)


def _text(node: Node) -> str:
    return node.text if isinstance(node, Mark) else ""


def _begins_unit(nodes: Nodes, at: int) -> bool:
    node = nodes[at]
    if is_sign(node, "\\frac"):
        return any(mark.kind == "text" for mark in flat(nodes[at + 1 : at + 3]))
    if not isinstance(node, Mark) or node.kind not in ("text", "name", "letter"):
        return False
    if node.kind == "text" or (node.kind == "name" and node.text.islower()):
        return True
    if node.text in ("C", "F") and at == len(nodes) - 1:
        return spelled(nodes[at - 1 : at]) in ("\\degree", "\\circ", "{ \\circ }")
    return is_number(nodes[at - 1]) and is_known(_run(nodes, at)[0])


def _run(nodes: Nodes, at: int) -> tuple[str, int]:
    """Letters without a blank between them, and where they end."""
    word, end = _text(nodes[at]), at + 1
    while end < len(nodes) and all(map(_is_letter, (nodes[at], nodes[end]))):
        if nodes[end].spaced:
            break
        word, end = word + _text(nodes[end]), end + 1
    return word, end


def _is_letter(node: Node) -> bool:
    return isinstance(node, Mark) and node.kind == "letter"


def _unit_words(nodes: Nodes) -> list[tuple[str, int]]:
    words: list[tuple[str, int]] = []
    at = 0
    while at < len(nodes):
        node = nodes[at]
        if is_sign(node, "/"):
            words.append(("/", 1))
            at += 1
        elif is_sign(node, "\\cdot"):
            at += 1
        elif is_sign(node, "\\frac") and len(nodes) == at + 3:
            above, below = nodes[at + 1 : at + 3]
            if not (isinstance(above, Group) and isinstance(below, Group)):
                raise Unreadable("a unit")
            words += [*_unit_words(above.inner), ("/", 1), *_unit_words(below.inner)]
            at += 3
        elif isinstance(node, Mark) and node.kind in ("text", "name", "letter"):
            word, at = _run(nodes, at)
            power = 1
            if at + 1 < len(nodes) and is_sign(nodes[at], "^"):
                exponent = spelled_as_written(nodes[at + 1])
                if not re.fullmatch("-?[1-9]", exponent):
                    raise Unreadable("a unit's power")
                power, at = int(exponent), at + 2
            words.append((word, power))
        else:
            raise Unreadable(f"{spelled([node])} in a unit")
    return words


def _marked(nodes: Nodes) -> tuple[Nodes, list[tuple[str, int]]]:
    """A percent or degree sign at the end as a unit, where it belongs to the whole."""
    for length, name in ((1, PERCENT), (1, DEGREE), (2, DEGREE)):
        rest, end = nodes[:-length], nodes[-length:]
        if len(nodes) <= length or any(is_sign(node, *_APART) for node in rest[1:]):
            continue
        if any(is_sign(node, *OF_ANGLES) for node in rest):
            continue
        sign = spelled(end)
        is_percent = name == PERCENT and sign in ("\\%", "%")
        is_degree = name == DEGREE and sign in (
            *(("\\degree",) if length == 1 else ()),
            "^ \\circ",
            "^ { \\circ }",
            "^ \\degree",
            "^ { \\degree }",
        )
        if is_percent or is_degree:
            return rest, [(name, 1)]
    return nodes, []

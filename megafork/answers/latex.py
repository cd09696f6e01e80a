r"""Text of an answer, LaTeX or plain, as a tree of marks and brackets: no meaning yet.

Every spelling that means the same becomes one mark here, by the tables of signs.py: spaces and
sizes are dropped (a blank is remembered, since it tells `2, 300` from `2,300`), Unicode becomes
LaTeX, numbers become fractions. Linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megafork.answers.formulas import Unreadable, written
from megafork.answers.numerals import GOES_ON, REPEATING, decimal, repeating
from megafork.answers.places import LONGEST
from megafork.answers.signs import (
    CHARACTERS,
    CLOSERS,
    LOWERED,
    MATRICES,
    NULL_DELIMITERS,
    OPENERS,
    PLAIN_NAMES,
    RAISED,
    SPACES,
    SYNONYMS,
    TEXTS,
    WITH_ARGUMENT,
)

_MOST_MARKS = 4_000
_DEEPEST = 40


@dataclass(frozen=True)
class Mark:
    """`kind`: number (`value`), letter, name (two capitals or more), command, sign, text, row."""

    kind: str
    text: str
    spaced: bool = False
    """After a blank"""
    value: Fraction = Fraction(0)


@dataclass(frozen=True)
class Group:
    """A bracket and its contents: `{`, `(`, `[`, `\\{`, or an environment (`env:matrix`)."""

    opener: str
    closer: str
    inner: tuple[Mark | Group, ...]
    spaced: bool = False


Node = Mark | Group
Nodes = Sequence[Node]

_THIN = r"(?:\{,\}|,\\!\s?|\\[,;:\ ]|~|[ ])"
_TOKEN = re.compile(
    rf"""
      (?P<blank> [\s~]+ | \\[,;:!>\s] | \$ | \\[()] | \\\[(?!\d) | \\\](?!\d) )
    | (?P<row> \\\\ \s* (?:\[ [^\]\[]{{0,20}} \])? )
    | (?P<number> (?=\.?\d) (?: [1-9]\d{{0,2}} (?:{_THIN}\d{{3}})+ (?!\d) | \d* )
        (?: \.\d+ | (?<=\d)\.(?![\d.]) )? (?: [eE][+-]?\d+ (?![\d.A-Za-z]) )? (?!\d|\.\d) )
    | \\begin\s*\{{ (?P<begin> [a-z]+ ) \*? \}} (?: \s* \{{ [lcr|\s]* \}} )?
    | \\end\s*\{{ (?P<end> [a-z]+ ) \*? \}}
    | (?P<command> \\[A-Za-z]+ )
    | (?P<escaped> \\. )
    | (?P<letters> [A-Za-z]+ )
    | (?P<sign> [^\w\s] | _ )
    """,
    re.VERBOSE | re.ASCII,
)
_TIGHT = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)", re.ASCII)
_APART = re.compile(r",\s|;")


def tree(text: str) -> tuple[Node, ...]:
    """Return the marks and groups of a text. Raises Unreadable for one that is too long, too deep,
    not closed, or has what is no sign of mathematics."""
    if len(text) > LONGEST:
        raise Unreadable("too long")
    text = _grouped(to_latex(text))
    inner: list[Node] = []
    stack: list[tuple[str, bool, list[Node]]] = []
    for mark in _marks(text):
        closes = mark.kind == "sign" and stack and mark.text in _closers_of(stack[-1][0])
        if closes:
            opener, spaced, outer = stack.pop()
            outer.append(Group(opener, mark.text, tuple(inner), spaced))
            inner = outer
        elif mark.kind == "sign" and (mark.text in OPENERS or mark.text.startswith("env:")):
            if len(stack) == _DEEPEST:
                raise Unreadable("too deep")
            stack.append((mark.text, mark.spaced, inner))
            inner = []
        elif mark.kind == "sign" and mark.text in ")]}\\}\\rfloor\\rceil":
            raise Unreadable(f"{mark.text} closes nothing")
        else:
            inner.append(mark)
    if stack:
        raise Unreadable(f"{stack[-1][0]} is not closed")
    return tuple(inner)


def spelled(nodes: Nodes) -> str:
    """The marks as one text, the same for all spellings that this file knows of."""
    return " ".join(
        f"{node.opener} {spelled(node.inner)} {node.closer}"
        if isinstance(node, Group)
        else (written(node.value) if _is_plain_number(node) else node.text)
        for node in nodes
    )


def _is_plain_number(mark: Mark) -> bool:
    """Return whether it is a number without a zero in front, unlike the minutes of 9:05."""
    return mark.kind == "number" and re.match(r"0\d", mark.text) is None


def _closers_of(opener: str) -> tuple[str, ...]:
    if opener in "([":
        return (")", "]")
    return (f"/{opener}",) if opener.startswith("env:") else (CLOSERS[opener],)


def to_latex(text: str) -> str:
    """Return the text with Unicode's signs of mathematics as LaTeX."""
    if text.isascii():
        return text
    text = RAISED.sub(lambda found: f"^{{{_plain(found[0])}}}", text)
    text = LOWERED.sub(lambda found: f"_{{{_plain(found[0])}}}", text)
    text = "".join(c if c.isascii() else CHARACTERS.get(c) or _folded(c) for c in text)
    return re.sub(r"\\sqrt ([0-9]+)", r"\\sqrt{\1}", text)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


def _folded(character: str) -> str:
    """½ as \\frac{1}{2}, full-width forms as the plain ones; others stay."""
    plain = unicodedata.normalize("NFKC", character)
    if "\u2044" in plain:
        above, _, below = plain.partition("\u2044")
        return f"\\frac{{{above}}}{{{below}}}"
    return plain if len(plain) == 1 and plain.isascii() else character


def _grouped(text: str) -> str:
    """Return the text without the commas of 12,345. In brackets commas separate, unless the text
    has a semicolon or a comma before a blank, as in (1,000, 2,000)."""
    if "," not in text:
        return text
    apart = _APART.search(text) is not None
    depth, place, parts = 0, 0, []
    for found in _TIGHT.finditer(text):
        before = text[place : found.start()]
        depth += sum(before.count(c) for c in "([") + before.count("\\{")
        depth -= sum(before.count(c) for c in ")]") + before.count("\\}")
        group = depth <= 0 or apart
        parts += [before, found[0].replace(",", "") if group else found[0]]
        place = found.end()
    return "".join(parts) + text[place:]


def _marks(text: str) -> list[Mark]:
    marks: list[Mark] = []
    place, spaced = 0, False
    while place < len(text):
        found = REPEATING.match(text, place) or GOES_ON.match(text, place)
        if found:
            new = [_number(repeating(found), found[0])]
        else:
            found = _TOKEN.match(text, place)
            if not found:
                raise Unreadable(f"no sign of mathematics: {text[place]!r}")
            if found["blank"]:
                place, spaced = found.end(), True
                continue
            if found["command"] in _COMMANDS_WITH_TEXT:
                end, new = _text_of(text, found.end(), found["command"])
                place = end
                marks += _after(new, spaced)
                spaced = False
                continue
            new = _of(found)
        place = found.end()
        if found.lastgroup == "command" and found["command"][1:] in NULL_DELIMITERS:
            place += text.startswith(".", place)
        if not new:  # a command that is like a blank
            spaced = True
            continue
        marks += _after(new, spaced)
        spaced = False
        if len(marks) > _MOST_MARKS:
            raise Unreadable("too many signs")
    return marks


_COMMANDS_WITH_TEXT = {f"\\{name}" for name in (*TEXTS, *WITH_ARGUMENT)}


def _after(new: list[Mark], spaced: bool) -> list[Mark]:
    if not spaced or not new:
        return new
    first = new[0]
    return [Mark(first.kind, first.text, True, first.value), *new[1:]]


def _of(found: re.Match[str]) -> list[Mark]:
    match found.lastgroup:
        case "number":
            return [_number(decimal(found[0]), found[0])]
        case "row":
            return [Mark("row", "\\\\")]
        case "begin":
            if found["begin"] not in MATRICES:
                raise Unreadable(f"\\begin{{{found['begin']}}}")
            return [Mark("sign", f"env:{MATRICES[found['begin']]}")]
        case "end":
            return [Mark("sign", f"/env:{MATRICES.get(found['end'], '?')}")]
        case "command":
            return _command(found["command"][1:])
        case "escaped":
            return [Mark("sign", {"\\|": "|"}.get(found[0], found[0]))]
        case "letters":
            return _letters(found["letters"])
    return [Mark("sign", found[0])]


def _command(name: str) -> list[Mark]:
    name = SYNONYMS.get(name, name)
    if name in SPACES:
        return []
    if name == "row":
        return [Mark("row", "\\\\")]
    if not name.isalpha():
        return [Mark("sign", name)]
    if name in ("lfloor", "rfloor", "lceil", "rceil"):
        return [Mark("sign", f"\\{name}")]
    return [Mark("command", f"\\{name}")]


def _letters(run: str) -> list[Mark]:
    """Single letters multiply; names of two capitals (a segment AB) and long words do not."""
    if run in ("and", "or"):
        return [Mark("text", run)]
    if run.lower() in PLAIN_NAMES and not run.isupper():
        return [Mark("command", PLAIN_NAMES[run.lower()])]
    if len(run) > 1 and (run.isupper() or len(run) > 3):
        return [Mark("name", run)]
    return [Mark("letter", letter) for letter in run]


def _text_of(text: str, place: int, command: str) -> tuple[int, list[Mark]]:
    """(where it ends, its marks) of a \\text{...} that begins at `place`."""
    while place < len(text) and text[place] in " {":
        place += 1
        if text[place - 1] == "{":
            break
    else:
        single = text[place : place + 1]
        if not single.isalpha():
            raise Unreadable(f"{command} without braces")
        return place + 1, [Mark("letter", single)]
    depth, end = 1, place
    while depth and end < len(text):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    if depth:
        raise Unreadable(f"{command}{{ is not closed")
    content = text[place : end - 1]
    if command[1:] in WITH_ARGUMENT or not content.strip(" ~"):
        return end, []
    words = " ".join(re.sub(r"\\[,;: ]|~|\$", " ", content).split())
    if words in ("e", "i") or (len(words) == 1 and words.isalpha() and command in _LETTERS):
        return end, [Mark("letter", words)]
    if _WORDS.fullmatch(words) or _UNITS.fullmatch(words):
        return end, [Mark("text", words)]
    return end, [Mark("sign", "{"), *_marks(content), Mark("sign", "}")]


_LETTERS = ("\\mathbf", "\\mathit", "\\boldsymbol", "\\bm")
"""Commands that set variables"""
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ .'/-])*")
_UNITS = re.compile(r"[A-Za-z]+(?:\^\{?-?[1-9]\}?)?(?:[ /][A-Za-z]+(?:\^\{?-?[1-9]\}?)?)*")


def _number(value: Fraction, text: str) -> Mark:
    return Mark("number", text, value=value)

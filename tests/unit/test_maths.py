"""The maths verifier: what it takes for the answer, and what it takes for equal."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from megafork.answers.comparison import are_equal
from megafork.answers.places import last_boxed
from megafork.errors import UserError
from megafork.verifiers.maths import verify
from tests.helpers.commands import ROOT

AIME = """
73 236 45 33 80 55 699 127 902 468 601 23 321 211 315 204 25 809 116 104 294 540 197 480 113 371
385 110 104 721 70 588 16 117 279 504 821 77 62 81 259 510 204 60 735 468 49 82 106 336 293 237 610
149 907 113 19 248 104 240
"""
"""Answers of AIME 2024 and 2025"""
_ROW = re.compile(r"\| `(.*)` \| `(.*)` \| (\*\*)?(yes|no)(?:\*\*)? \|")
MOST_MISSED = 10


def table():
    """Rows (kind, answer, response, are they equal, is that in bold) of docs/maths_answers.md."""
    text = (ROOT / "docs" / "maths_answers.md").read_text(encoding="utf-8")
    rows = []
    for section in text.split("\n## ")[1:]:
        kind, *lines = section.splitlines()
        for line in lines:
            if line.startswith("| `"):
                row = _ROW.fullmatch(line)
                rows.append((kind, row[1], row[2], row[4] == "yes", row[3] is not None))
    return rows


TABLE = table()


def test_the_table_is_whole_and_says_how_often_it_is_wrong():
    assert len(set(TABLE)) == len(TABLE) >= 300
    equal = [row for row in TABLE if row[3]]
    missed = [row for row in TABLE if row[4]]
    assert all(is_equal for *_, is_equal, _ in missed)
    assert len(missed) <= MOST_MISSED
    text = (ROOT / "docs" / "maths_answers.md").read_text(encoding="utf-8")
    counts = f"{len(equal)} equal pairs, of which {len(missed)} are judged unequal, and"
    assert f"{counts} {len(TABLE) - len(equal)} unequal pairs" in " ".join(text.split())


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, *_ in TABLE))
def test_a_kind_of_the_table(kind):
    wrong = [
        (answer, response)
        for of_kind, answer, response, is_equal, is_missed in TABLE
        if of_kind == kind
        and verify("", f"So it is \\boxed{{{response}}}.", answer)
        != float(is_equal and not is_missed)
    ]
    assert wrong == []


def test_aime_answers_verify_against_themselves():
    answers = AIME.split()
    assert len(answers) == 60
    for answer in answers:
        assert verify("", f"So it is\n$$\\boxed{{{answer}}}$$", answer) == 1.0
        assert verify("", f"\\boxed{{{answer}}}", answer.zfill(3)) == 1.0
        assert verify("", f"\\boxed{{{answer}.0}}", answer) == 1.0
        assert verify("", f"\\boxed{{{int(answer) + 1}}}", answer) == 0.0
        assert verify("", f"so {answer} is it", answer) == 0.0


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("none", None),
        ("\\boxed{42}", "42"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{ \\boxed{7} }", "7"),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed{42", None),
        ("\\boxed{1} \\boxed{{2}", None),
        ("\\boxed 42", None),
        ("\\boxed 4{2}", None),
        ("\\boxed\\{42\\}", None),
        ("\\boxed{" + "1" * 50_000 + "}", None),
        ("x" * 5_000_000 + "\\boxed{3}" + "y" * 5_000_000, "3"),
    ],
)
def test_the_last_box_counts(text, boxed):
    assert last_boxed(text) == boxed


def test_an_empty_answer_is_a_mistake_in_the_data():
    for answer in ("", " $$ ", "\\boxed{}"):
        with pytest.raises(UserError, match="maths: the answer of the prompt 'p' is empty"):
            verify("p", "\\boxed{42}", answer)


def test_what_is_refused_is_right_where_it_is_spelled_as_the_answer():
    for text in ("10^{10^{100}}", "100000!", "(" * 20 + "x" + ")" * 20, "7^{1000000}"):
        assert verify("", f"\\boxed{{{text}}}", text) == 1.0
        assert verify("", f"\\boxed{{{text}}}", "42") == 0.0


DIGITS = "7" * 9_999
EXACT = {
    "integers": (DIGITS + "1", DIGITS + "2"),
    "decimals": (f"0.{DIGITS}", f"0.{DIGITS[1:]}8"),
    "denominators": (f"\\frac{{1}}{{{DIGITS}1}}", f"\\frac{{1}}{{{DIGITS}3}}"),
    "powers of ten": ("10^{-9999}", "1.0000001\\times10^{-9999}"),
    "powers": ("2^{33000}", "2^{33000}+1"),
    "roots": (f"\\sqrt{{{DIGITS[:2000]}}}", f"\\sqrt{{{DIGITS[:1999]}8}}"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_numbers_of_ten_thousand_digits_are_compared_to_the_last_one(kind):
    number, other = EXACT[kind]
    assert are_equal(number, f"+{number}")
    assert are_equal(f"{number}+0", number)
    assert not are_equal(number, other)
    assert not are_equal(other, number)


def test_beyond_ten_thousand_digits_a_number_is_right_only_as_it_is_spelled():
    longer = DIGITS + "11"
    assert are_equal(longer, longer)
    assert not are_equal(longer, f"+{longer}")
    assert not are_equal("10^{10000}", f"1{'0' * 10_000}")


@pytest.mark.parametrize("sign", ["\u200b", "\u202e", "\0"])
def test_signs_that_nobody_sees_are_not_overlooked(sign):
    assert not are_equal("42", f"4{sign}2")


def test_no_answer_is_evaluated_by_a_library():
    """Neither sympy, whose reader runs what it reads, nor torch is in a worker."""
    code = (
        "import sys; from megafork.verifiers.maths import verify;"
        "assert verify('', r'\\boxed{\\sqrt8}', r'2\\sqrt2') == 1.0;"
        "assert not {'sympy', 'torch', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""The maths verifier: what it takes for the answer, and what it takes for equal."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from megafork.errors import UserError
from megafork.rewards.maths import last_boxed, verify
from tests.helpers.commands import ROOT

AIME = """
73 236 45 33 80 55 699 127 902 468 601 23 321 211 315 204 25 809 116 104 294 540 197 480 113 371
385 110 104 721 70 588 16 117 279 504 821 77 62 81 259 510 204 60 735 468 49 82 106 336 293 237 610
149 907 113 19 248 104 240
"""
"""Answers of AIME 2024 and 2025"""
_ROW = re.compile(r"\| `(.*)` \| `(.*)` \| (?:\*\*)?(right|wrong)(?:\*\*)? \|")


def table(heading):
    """Rows (answer, response, verdict, is it in bold) under a heading of docs/verifiers.md."""
    text = (ROOT / "docs" / "verifiers.md").read_text(encoding="utf-8")
    section = text.split(f"### {heading}\n")[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [_ROW.fullmatch(line) for line in lines]
    assert None not in rows
    return [(*row.groups(), "**" in line) for row, line in zip(rows, lines, strict=True)]


EQUAL, UNEQUAL = table("Equivalent"), table("Not equivalent")


def test_the_tables_are_whole():
    assert len(set(EQUAL)) == len(set(UNEQUAL)) == 50
    assert all(bold == (judged == "wrong") for _, _, judged, bold in EQUAL)
    assert all(bold == (judged == "right") for _, _, judged, bold in UNEQUAL)


@pytest.mark.parametrize(("answer", "response", "judged", "_"), EQUAL + UNEQUAL)
def test_a_line_of_the_documentation(answer, response, judged, _):
    assert verify("", response, answer) == float(judged == "right")


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
        ("\\boxed{" + "1" * 5000 + "}", None),
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


def test_sympys_parse_expr_is_out_of_reach():
    """With math-verify's reader of plain expressions every second line of the tables calls it."""
    code = (
        "import math_verify.parser as p; p.parse_expr = p.parse_expr_cached = None;"
        "p.extract_expr = None; from megafork.rewards.maths import verify;"
        "assert verify('', r'\\boxed{1/2 + 1}', '1.5') == 1.0;"
        "assert 'torch' not in __import__('sys').modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

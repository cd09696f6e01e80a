"""The Countdown verifier against responses judged by hand."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megafork.errors import UserError
from megafork.verifiers.countdown import verify

PROMPT, ANSWER = "6 2 4>48:", "48"
# A verdict takes microseconds; a parser that backtracks or evaluates needs minutes or never ends.
SECONDS_FOR_HUGE_INPUT = 1.0


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("6 2 4>48:", "6*4=24;2*24=48."),
        ("6 2 4>48:", "6*4=24;24*2=48."),
        ("6 2 4>48:", "6*2=12;12*4=48."),
        ("6 2 4>48:", "4*2=8;8*6=48."),
        ("5 5 5>30:", "5*5=25;25+5=30."),
        ("9 3 9>3:", "9-9=0;0+3=3."),  # zero is a number like any other
        ("8 9 9>648:", "9*8=72;72*9=648."),
        ("14 3 11>47:", "3*11=33;33+14=47."),
        ("2 3>6:", "2*3=6."),
        ("1 2 3 4>24:", "1*2=2;2*3=6;6*4=24."),
        ("1 2 3 4>21:", "1+2=3;3+4=7;3*7=21."),  # 3 is there twice: given and computed
    ],
)
def test_right(prompt: str, response: str) -> None:
    assert verify(prompt, response, prompt.split(">")[1][:-1]) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("6*4=25;2*25=48.", id="first step miscalculated"),
        pytest.param("6*4=24;2*24=47.", id="last step miscalculated, misses the target"),
        pytest.param("6+4=10;4*12=48.", id="number reused and another missing"),
        pytest.param("6*2=12;6*8=48.", id="given number reused"),
        pytest.param("6*4=24;24+24=48.", id="result reused"),
        pytest.param("4*2=8;6*9=48.", id="operand that does not exist"),
        pytest.param("6*8=48.", id="one step, number not given"),
        pytest.param("6*4=24.", id="number missing"),
        pytest.param("6*4=24;2*24=48;48+0=48.", id="a step too many"),
        pytest.param("6*4=24;2+24=26.", id="legal, but another target"),
        pytest.param("6*2=12;12*4=48;.", id="empty last step"),
        pytest.param(";6*2=12;12*4=48.", id="empty first step"),
        pytest.param("", id="empty"),
        pytest.param(".", id="only the full stop"),
        pytest.param("48.", id="only the target"),
    ],
)
def test_breaks_the_rules(response: str) -> None:
    assert verify(PROMPT, response, ANSWER) == 0.0


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("6*4=24;2*24=48", id="no full stop"),
        pytest.param("6*4=24;2*24=48..", id="two full stops"),
        pytest.param("6*4=24;2*24=48.\n", id="trailing newline"),
        pytest.param("6*4=24\n;2*24=48.", id="newline after a step"),
        pytest.param("6*4=24;2*24=48. ", id="trailing space"),
        pytest.param("6*4=24;2*24=48.<eos>", id="trailing token"),
        pytest.param("6*4=24;2*24=48.6*4=24;2*24=48.", id="answered twice"),
        pytest.param("6 * 4 = 24; 2 * 24 = 48.", id="spaces"),
        pytest.param(" 6*4=24;2*24=48.", id="leading space"),
        pytest.param("6*4=24,2*24=48.", id="comma for semicolon"),
        pytest.param("6×4=24;2×24=48.", id="multiplication sign"),
        pytest.param("06*4=24;2*24=48.", id="leading zero"),
        pytest.param("+6*4=24;2*24=48.", id="sign"),
        pytest.param("6*4=24;2*24=4_8.", id="underscore, which int() takes"),
        pytest.param("6*4=24;2*24=48.0.", id="decimal"),
        pytest.param("6*4=2e1;2*24=48.", id="exponent"),
        pytest.param("6*4=24=24;2*24=48.", id="two results"),
        pytest.param("(6*4)=24;2*24=48.", id="parentheses"),
        pytest.param("6*4*2=48.", id="two operations in a step"),
        pytest.param("٦*٤=٢٤;٢*٢٤=٤٨.", id="Arabic-Indic digits, which int() takes"),
        pytest.param("６*４=２４;２*２４=４８.", id="full-width digits, which int() takes"),
        pytest.param("6*4=24;2*24=4\u0668.", id="one foreign digit"),
        pytest.param("6*4=24;2*24=48\u3002", id="ideographic full stop"),
        pytest.param("6*4=24;2*24=48\x00.", id="null byte"),
        pytest.param("6*4=24;2*24=\ud80048.", id="lone surrogate"),
    ],
)
def test_misspelt(response: str) -> None:
    assert verify(PROMPT, response, ANSWER) == 0.0


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("3 7 9>5:", "3-7=-4;-4+9=5."),
        ("3 7 9>5:", "3-7=-4;9+-4=5."),
        ("3 7 9>5:", "3-7=4;9-4=5."),  # the sign dropped
    ],
)
def test_negative_intermediate(prompt: str, response: str) -> None:
    assert verify(prompt, response, "5") == 0.0
    assert verify("3 7 9>5:", "9-7=2;2+3=5.", "5") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "__import__('os').system('touch {canary}')",
        "__import__('os').system('touch {canary}').",
        "6*4=24;2*24=48.;__import__('os').system('touch {canary}').",
        "6*4=24;open('{canary}','w')=48.",
        "exec(\"open('{canary}','w')\").",
        "$(touch {canary}).",
        "6**4=1296;2*24=48.",
        "9**9**9**9=48;2*24=48.",
    ],
)
def test_code_is_never_run(response: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    assert verify(PROMPT, response.replace("{canary}", str(canary)), ANSWER) == 0.0
    assert not canary.exists()


@pytest.mark.parametrize(
    "response",
    [
        pytest.param("9" * 2_000_000 + ".", id="digits"),
        pytest.param("6*4=" + "0" * 2_000_000 + "24;2*24=48.", id="zeros"),
        pytest.param("6*4=24;" * 300_000 + "2*24=48.", id="steps"),
        pytest.param(";" * 2_000_000 + ".", id="separators"),
        pytest.param("." * 2_000_000, id="full stops"),
        pytest.param("(" * 2_000_000, id="parentheses"),
        pytest.param("6*4=24;2*24=48." + " " * 2_000_000, id="right, then spaces"),
    ],
)
def test_huge_response_is_cheap(response: str) -> None:
    start = time.perf_counter()
    assert verify(PROMPT, response, ANSWER) == 0.0
    assert time.perf_counter() - start < SECONDS_FOR_HUGE_INPUT


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "48:",
        ">48:",
        "6>48:",
        "6 2 4>48",
        "6 2 4:48",
        "6 2 4>:",
        "6 2 4>48:\n",
        " 6 2 4>48:",
        "6  2 4>48:",
        "6,2,4>48:",
        "6 2 4>-48:",
        "6 2 x>48:",
        "6 2 ٤>48:",
        "6 2 04>48:",
        "6 2 40000>48:",
        "1 2 3 4 5 6 7 8 9>48:",
        "6 2 4>48:6*4=24;2*24=48.",
    ],
)
def test_malformed_prompt_is_named(prompt: str) -> None:
    with pytest.raises(UserError, match="malformed prompt") as error:
        verify(prompt, "6*4=24;2*24=48.", ANSWER)
    assert repr(prompt) in str(error.value)


def test_huge_prompt_is_cheap_and_cut_in_the_message() -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match="1000000 characters") as error:
        verify("1 " * 500_000, "6*4=24;2*24=48.", ANSWER)
    assert time.perf_counter() - start < SECONDS_FOR_HUGE_INPUT
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("answer", ["49", "", "48.0", " 48", "６", "9" * 1_000_000])
def test_answer_must_be_the_target(answer: str) -> None:
    with pytest.raises(UserError, match="the answer column must hold the target"):
        verify(PROMPT, "6*4=24;2*24=48.", answer)

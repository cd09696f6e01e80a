"""Where an answer stands: in responses, in the data's solutions, and what is told when nowhere."""

from __future__ import annotations

import asyncio
import time

import pytest

from megafork.answers.places import PLACES, Search, find_answer, gold_answer
from megafork.config import RewardConfig
from megafork.errors import UserError
from megafork.verifiers.exact import verify as exact
from megafork.verifiers.maths import verify
from megafork.verifiers.verifier import Judge

DAPO = "We compute.\n\nAnswer: $34$"
GSM8K = "She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"
SOLUTION = r"Adding, $x = \frac{1}{2}$, so the answer is $\boxed{\frac{1}{2}}$."


@pytest.mark.parametrize(
    ("place", "response", "answer"),
    [
        ("boxed", r"\boxed{1} and \boxed{2}", "2"),
        ("boxed", r"\boxed{1} and \boxed{2", None),
        ("boxed", r"\boxed{ }", None),
        ("boxed", DAPO, None),
        ("answer_line", DAPO, "$34$"),
        ("answer_line", "Answer: 33\nno\nAnswer: 34", "34"),
        ("answer_line", "**Answer:** 34", "34"),
        ("answer_line", "**Answer: 34**", "34"),
        ("answer_line", "### Final Answer: 34", "34"),
        ("answer_line", "The final answer is: 34", "34"),
        ("answer_line", "The answer is 34.", "34."),
        ("answer_line", r"Answer: $\boxed{34}$", "34"),
        ("answer_line", "answer：34", "34"),
        ("answer_line", "Answer:", None),
        ("answer_line", "Answer: 33\nAnswer:", None),
        ("answer_line", "Answers: 34", None),
        ("answer_line", "my Answer: 34", None),
        ("answer_line", "Answer 34", None),
        ("hash", GSM8K, "18"),
        ("hash", "#### 18\nno:\n####19", "19"),
        ("hash", "##### 18", None),
        ("hash", "so #### 18", None),
        ("last_number", "so 5 and then 1,234.50 dollars.", "1,234.50"),
        ("last_number", "x = -3.", "-3"),
        ("last_number", "10-3", "3"),
        ("last_number", "it is 3/4.", "3/4"),
        ("last_number", r"it is \frac{3}{4}.", r"\frac{3}{4}"),
        ("last_number", r"a share of 12.5\%, then", r"12.5\%"),
        ("last_number", "1, 2", "2"),
        ("last_number", "x2", None),
        ("last_number", "none", None),
    ],
)
def test_each_place(place, response, answer):
    assert find_answer(response, [place]) == answer


def test_places_are_asked_in_order():
    response = "Answer: 2\n" + r"but \boxed{3}, 4"
    assert find_answer(response, ["boxed", "answer_line"]) == "3"
    assert find_answer(response, ["answer_line", "boxed"]) == "2"
    assert find_answer(response, ["hash", "last_number"]) == "4"
    assert find_answer("nothing", PLACES) is None


@pytest.mark.parametrize(
    ("answer", "places", "gold"),
    [
        ("42", ["boxed"], "42"),
        (GSM8K, ["boxed"], "18"),
        (GSM8K, ["last_number"], "18"),
        (SOLUTION, ["hash"], r"\frac{1}{2}"),
        ("Answer: 7", ["boxed"], "7"),
        (r"\frac{1}{2}", ["last_number"], r"\frac{1}{2}"),
        ("x = 5", ["last_number"], "x = 5"),
        ("He buys 3 boxes of 4 pens and so has 12 pens", ["last_number"], "12"),
        ("He buys 3 boxes of 4 pens and so has 12 pens", ["boxed"], None),
        (r"\boxed{}", ["boxed"], ""),
    ],
)
def test_the_answer_of_the_data_may_be_a_whole_solution(answer, places, gold):
    assert gold_answer(answer, places) == (answer if gold is None else gold)


def test_dapos_own_prompts_score_with_an_answer_line():
    assert verify("", DAPO, "34") == 0.0
    assert verify("", DAPO, "34", places=["answer_line"]) == 1.0
    assert verify("", DAPO, "35", places=["answer_line", "boxed"]) == 0.0
    assert verify("", "so\n#### 1,800", GSM8K.replace("18", "1800"), places=["hash"]) == 1.0
    assert exact("", "so\n#### 18", GSM8K, places=["hash"]) == 1.0
    assert exact("", "so\n#### 18.0", GSM8K, places=["hash"]) == 0.0


def test_the_setting_reaches_the_workers():
    config = RewardConfig(verifier="maths", answer_from="answer_line", workers=1, timeout_s=60)
    with Judge(config) as judge:
        assert asyncio.run(judge("", DAPO, "34")).accuracy == 1.0
        assert asyncio.run(judge("", r"\boxed{34}", "34")).accuracy == 0.0


def test_it_is_told_once_when_the_first_responses_have_no_answer():
    search, told = Search(["boxed"]), []
    for _ in range(3 * Search.FIRST):
        told.append(search.look(DAPO))
    (message,) = [text for text in told if text is not None]
    assert told.index(message) == 63
    for part in (
        "none of the first 64",
        "reward.answer_from=boxed",
        "$34$",
        "answer_line would find",
    ):
        assert part in message


def test_it_is_not_told_when_one_of_them_has_one():
    search = Search(["boxed"])
    texts = [DAPO] * 63 + [r"\boxed{34}"] + [DAPO] * 200
    assert [search.look(text) for text in texts] == [None] * len(texts)


def test_a_judge_tells_it():
    told = []
    with Judge(RewardConfig(verifier="maths", workers=1, timeout_s=60)) as judge:
        judge.tell = told.append

        async def all_of_them():
            await asyncio.gather(*(judge("", DAPO, "34") for _ in range(100)))

        asyncio.run(all_of_them())
    assert len(told) == 1


@pytest.mark.parametrize("verifier", ["countdown", "json:loads", "reasoning-gym:gcd"])
def test_a_verifier_that_looks_for_itself_does_not_take_the_setting(verifier):
    with pytest.raises(UserError, match=r"reward\.answer_from=hash is for the verifiers maths and"):
        RewardConfig(verifier=verifier, answer_from="hash").check()


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ValueError, match="answer_from"):
        RewardConfig(verifier="maths", answer_from="box")


@pytest.mark.parametrize("text", ["Answer:", "\n", "####\n", "1", "-", "1,", " ", "*", "\\boxed{"])
def test_long_texts_are_searched_quickly(text):
    """An expression that read a megabyte again from every character would take hours."""
    started = time.process_time()
    for place in PLACES:
        find_answer(text * (1_000_000 // len(text)), [place])
    assert time.process_time() - started < 30

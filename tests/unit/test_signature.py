"""Verifiers of our signature and of TRL's: what they are handed, and which cannot be called."""

from __future__ import annotations

import functools

import pytest

from megafork.data.columns import Further
from megafork.errors import UserError
from megafork.verifiers.names import check_verifiers, columns_of
from megafork.verifiers.signature import Signature

ROW = {"level": 3, "rate": 0.25, "source": "a"}
QUESTION = ("1 + 1", "2", "two")


def score(function, columns=ROW, question=QUESTION):
    """What the verifier says of a row with the columns that it takes."""
    signature = Signature.of(function, "m:f")
    further = signature.further
    names = set(columns) if further.takes_all else further.required | further.optional
    return signature.call(function, question, {n: v for n, v in columns.items() if n in names})


def test_a_plain_verifier_is_handed_no_columns():
    def verify(prompt, response, answer):
        return f"{len(prompt)}{len(response)}{len(answer)}"

    assert score(verify) == 513.0
    assert Signature.of(verify, "m:f").further == Further()
    assert score(lambda *all_three: len(all_three)) == 3.0
    assert score(functools.partial(lambda a, b, c, *, d: d, d=7)) == 7.0
    assert score(lambda p, r, a: True) == 1.0


def test_columns_reach_the_parameters_of_their_names():
    def verify(prompt, response, answer, level, rate=1.0, other=5):
        return level + rate + other

    assert score(verify) == 8.25
    further = Signature.of(verify, "m:f").further
    assert further == Further(frozenset({"level"}), frozenset({"rate", "other"}))
    assert score(lambda p, r, a, **columns: len(columns)) == 3.0
    # A column never takes the place of prompt, response or answer.
    assert score(lambda level, response, answer, **rest: float(level == "1 + 1") + len(rest)) == 3.0


def trl_accuracy(completions, solution, **kwargs):
    """As in TRL's documentation."""
    return [
        1.0 if text == right else 0.0 for text, right in zip(completions, solution, strict=True)
    ]


def test_trl_s_functions_take_lists():
    assert score(trl_accuracy, {"solution": "2"}) == 1.0
    assert score(trl_accuracy, {"solution": "3"}) == 0.0
    assert Signature.of(trl_accuracy, "m:f").further.required == {"solution"}

    def all_of_it(prompts, completions, answer, level, trainer_state=None):
        assert (prompts, completions, answer, level) == (["1 + 1"], ["2"], ["two"], [3])
        return [0.5]

    assert score(all_of_it) == 0.5
    assert Signature.of(all_of_it, "m:f").further.required == {"level"}


def test_trl_s_functions_see_a_chat_as_turns():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1"}]

    def reward(prompts, completions, **kwargs):
        assert prompts == [turns] and "prompt" not in kwargs
        return [float(completion[0]["content"]) for completion in completions]

    assert score(reward, ROW | {"prompt": turns}) == 2.0
    assert score(lambda completions: [len(completions[0])], {"prompt": turns}) == 1.0


async def waits(prompt, response, answer):
    return 1.0


WRONG = {
    "two parameters": (lambda response, answer: 1.0, "takes 2 values"),
    "none": (lambda **columns: 1.0, "takes 0 values"),
    "named alone": (lambda *, prompt, response, answer: 1.0, "takes 0 values"),
    "four by position": (
        lambda a, b, c, d, /: 1.0,
        "takes more than three values by position alone",
    ),
    "async": (waits, "is async"),
    "TRL's tokens": (
        lambda completions, completion_ids: [1.0],
        "needs completion_ids, which it is not handed",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_called_is_told(case):
    function, message = WRONG[case]
    with pytest.raises(UserError, match=rf"reward.verifier='m:f', with .*{message}: it must be a"):
        Signature.of(function, "m:f")


def test_verifiers_by_name():
    """Built-in ones take no columns, whatever parameters they have for settings."""
    names = ["maths", "exact", "countdown", "reasoning-gym:chain_sum"]
    check_verifiers(names)
    assert columns_of(names) == Further()
    assert columns_of([*names, f"{__name__}:trl_accuracy"]).takes_all
    with pytest.raises(UserError, match="takes 1 values"):
        check_verifiers([f"{__name__}:score_of_one"])


def score_of_one(response):
    return 1.0

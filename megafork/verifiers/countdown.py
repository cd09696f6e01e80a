"""Verifier for Countdown: reach a target by using every given number exactly once.

A prompt lists the numbers and the target, `6 2 4>48:`. A right response is one step per pair of
numbers, closed by a full stop: `6*4=24;2*24=48.`. A step takes two numbers that are available
(given, or left by an earlier step) and leaves its result in their place.

The response is text that a model wrote: it is matched against a whitelist and never evaluated.
"""

from __future__ import annotations

import re
from collections import Counter
from operator import add, mul, sub

from megafork.errors import UserError

# Natural numbers in ASCII, without leading zeros. A negative result has no spelling here, which is
# what makes it wrong.
_NUMBER = r"(?:0|[1-9][0-9]{0,3})"
_STEP = re.compile(rf"({_NUMBER})([-+*])({_NUMBER})=({_NUMBER})")
_PROMPT = re.compile(rf"({_NUMBER}(?: {_NUMBER}){{1,7}})>({_NUMBER}):")
_MAX_STEP_LENGTH = len("9999+9999=9999")
_OPERATIONS = {"+": add, "-": sub, "*": mul}


def verify(prompt: str, response: str, answer: str) -> float:
    """Returns 1.0 for a response that reaches the target by the rules, else 0.0.

    Numbers and target come from `prompt`, which is what the model was shown. `answer` repeats the
    target. A malformed prompt or another target in `answer` is a mistake in the data, not in the
    response, and raises UserError.
    """
    numbers, target = _read_prompt(prompt)
    if answer != str(target):
        raise UserError(
            f"countdown: prompt {prompt!r} asks for {target}, but its answer is {_shown(answer)}: "
            f"the answer column must hold the target"
        )
    return float(_reaches(numbers, target, response))


def _read_prompt(prompt: str) -> tuple[list[int], int]:
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise UserError(
            f"countdown: malformed prompt {_shown(prompt)}: expected two to eight numbers and a "
            f"target, all between 0 and 9999, written like '6 2 4>48:'"
        )
    numbers, target = match.groups()
    return [int(number) for number in numbers.split(" ")], int(target)


def _reaches(numbers: list[int], target: int, response: str) -> bool:
    num_steps = len(numbers) - 1
    # Checked first, so that the time does not grow with the response.
    if len(response) > num_steps * (_MAX_STEP_LENGTH + 1) or not response.endswith("."):
        return False
    steps = response[:-1].split(";")
    if len(steps) != num_steps:
        return False

    available = Counter(numbers)
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            return False
        left, right, result = (int(match[group]) for group in (1, 3, 4))
        for operand in (left, right):
            if available[operand] == 0:
                return False
            available[operand] -= 1
        if _OPERATIONS[match[2]](left, right) != result:
            return False
        available[result] += 1
    # As many steps as it takes to merge all numbers leave one number: the last result.
    return available[target] == 1


def _shown(text: str) -> str:
    """`text` for an error message, cut to a readable length."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}... ({len(text)} characters)"

"""A verifier of one's own: Countdown with a little credit for calculating well.

reward.verifier = "partial_credit:verify" names it; the folder that a run is started in is searched.
"""

import re

from megafork.verifiers.countdown import verify as is_solution

_STEP = re.compile(r"([0-9]{1,4})([-+*])([0-9]{1,4})=([0-9]{1,4})")


def verify(prompt: str, response: str, answer: str) -> float:
    """Return 1.0 for a solution, else 0.2 times the share of its steps that are right."""
    if is_solution(prompt, response, answer) == 1.0:
        return 1.0
    steps = response.strip().removesuffix(".").split(";")
    return 0.2 * sum(map(_is_right, steps)) / len(steps)


def _is_right(step: str) -> bool:
    if (found := _STEP.fullmatch(step)) is None:
        return False
    a, b, result = int(found[1]), int(found[3]), int(found[4])
    return result == {"+": a + b, "-": a - b, "*": a * b}[found[2]]

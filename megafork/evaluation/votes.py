"""What a response votes for: the unit that maj@k counts."""

from __future__ import annotations

from typing import Literal

from megafork.answers.comparison import canonical_answer
from megafork.answers.places import BOXED, find_answer
from megafork.config import RewardConfig


def vote(
    response: str,
    how: Literal["auto", "boxed", "text"],
    reward: RewardConfig,
    *,
    truncated: bool,
) -> str | None:
    """The text that votes are counted by; None: no vote.

    boxed: the answer where the verifier looks for it, a box unless reward.answer_from is set; for
    maths in its canonical form, so that 1/2 and 0.5 are one. text: the whole response, stripped.
    auto: the answer; where there is none, the text of a response that ended.
    """
    if how == "text":
        return response.strip() or None
    answer = find_answer(response, reward.places or BOXED)
    if answer is not None:
        is_maths = reward.verifiers[0] == "maths"
        return canonical_answer(answer) if is_maths else "".join(answer.split())
    if how == "boxed" or truncated:
        return None
    return response.strip() or None

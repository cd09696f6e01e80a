r"""Verifier for mathematics: is the answer of a response equal to the answer of the data?

Nothing is evaluated as code, and nothing is compared by rounding (megafork/answers). What is not
understood is right only where it is spelled as the answer. docs/verifiers.md: what counts as equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from megafork.answers.comparison import are_equal, bare
from megafork.answers.places import BOXED, Place, find_answer, gold_answer
from megafork.errors import UserError


def verify(prompt: str, response: str, answer: str, *, places: Sequence[Place] = BOXED) -> float:
    r"""1.0 when the answer that stands at `places` of the response equals `answer`, else 0.0.

    A response without one is wrong. Raises UserError for an answer of the data that is empty.
    """
    gold = bare(gold_answer(answer, places))
    if not gold:
        raise UserError(f"maths: the answer of the prompt {prompt[:60]!r} is empty: {answer!r}")
    found = find_answer(response, places)
    return float(found is not None and are_equal(gold, bare(found)))

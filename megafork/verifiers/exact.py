"""Verifier that compares texts: right when the response is the answer, letter by letter."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from megafork.answers.places import Place, find_answer, gold_answer


def verify(
    prompt: str, response: str, answer: str, *, places: Sequence[Place] | None = None
) -> float:
    """1.0 when both are the same text (NFC) once the white space around them is gone, else 0.0.

    places: where in both the answer stands; None: it is the whole text.
    """
    if places is not None:
        response, answer = find_answer(response, places) or "", gold_answer(answer, places)
    wanted = unicodedata.normalize("NFC", answer.strip())
    # Composing only shortens, to a third at the very most, so that megabytes need no look.
    found = response.strip()
    if len(found) > 3 * len(wanted):
        return 0.0
    return float(unicodedata.normalize("NFC", found) == wanted)

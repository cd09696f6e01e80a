"""Responses for the page: every token visible, shaded by its entropy, forking or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megafork.metrics.palette import shade_of
from megafork.metrics.run_files import Row
from megafork.system.printable import token_text

_MOST_TOKENS = 100_000
"""on the page; a browser takes seconds for as many"""
_SIGNS = {"\n": "\u21b5\n", "\r": "\u240d", "\t": "\u21e5\t", "\u2028": "\u21b5\u2028", " ": " "}


@dataclass(frozen=True)
class Token:
    text: str
    shade: int
    is_selected: bool
    about: str
    """what is known of it, in one line"""


@dataclass(frozen=True)
class Response:
    row: Row
    tokens: list[Token]

    @property
    def num_selected(self) -> int:
        return sum(token.is_selected for token in self.tokens)


@dataclass(frozen=True)
class SampledStep:
    step: int
    responses: list[Response]


def visible(text: str) -> str:
    """Return the token with signs for what has no picture; of blanks alone, dots.

    A newline keeps its break after its sign. Controls, marks that reorder text and characters that
    no font has, blanks other than the space among them, are written as their code.
    """
    if not text:
        return "\u2205"
    if not text.strip(" "):
        return "\u00b7" * len(text)
    return token_text(text, _SIGNS, lambda character: f"\u27e8U+{ord(character):04X}\u27e9")


def sampled_steps(samples: Sequence[Row], most_tokens: int = _MOST_TOKENS) -> list[SampledStep]:
    """Return the steps whose responses the page shows, each response whole: the last and the first,
    then the latest of the others while they fit. In the order of the steps."""
    steps: dict[int, list[Row]] = {}
    for row in samples:
        steps.setdefault(row["step"], []).append(row)
    chosen: set[int] = set()
    room = most_tokens
    ends = {max(steps, default=0), min(steps, default=0)}
    for step in sorted(steps, key=lambda s: (s in ends, s), reverse=True):
        room -= sum(len(row["token_ids"]) for row in steps[step])
        if room < 0 and step not in ends:
            break
        chosen.add(step)
    return [SampledStep(step, [_response(row) for row in steps[step]]) for step in sorted(chosen)]


def _response(row: Row) -> Response:
    entropies, num = row["entropies"], len(row["token_ids"])
    rank = [0] * num
    for place, index in enumerate(
        sorted(range(num), key=lambda i: -entropies[i] if entropies else 0)
    ):
        rank[index] = place + 1
    tokens = []
    for i, (text, token_id, logprob, is_selected) in enumerate(
        zip(row["text"], row["token_ids"], row["rollout_logprobs"], row["selected"], strict=True)
    ):
        of_entropy = f"{entropies[i]:.4f} nats, rank {rank[i]} of {num}, " if entropies else ""
        about = f"{of_entropy}log-probability {logprob:.4f}, id {token_id}"
        shade = shade_of(entropies[i]) if entropies else 0
        tokens.append(Token(visible(text), shade, is_selected, about))
    return Response(row, tokens)

"""Verifiers by name or import path. Imports nothing heavy: every worker starts with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megafork.data.columns import NO_FURTHER, Further
from megafork.errors import UserError
from megafork.system.plugins import load_plugin
from megafork.verifiers.signature import Signature

if TYPE_CHECKING:
    from megafork.config import RewardConfig
    from megafork.data.row_reader import Row

Verifier = Callable[..., Any]
"""(prompt, response, answer, **columns) -> reward, 1.0 for a right response as a rule; or TRL's
(signature.py)"""

NAMES = {
    "maths": "megafork.verifiers.maths:verify",
    "countdown": "megafork.verifiers.countdown:verify",
    "exact": "megafork.verifiers.exact:verify",
}


FINDERS = ("maths", "exact")
"""Verifiers that take `places`, where an answer stands (answers/places.py)"""


def check_verifiers(names: Iterable[str]) -> None:
    """Raise UserError for the first name that `load_verifier` does not find, or that names what
    cannot be called."""
    for name in names:
        signature_of(load_verifier(name), name)


def columns_of(names: Iterable[str]) -> Further:
    """Return the columns that verifiers take beside prompt, response and answer.

    Built-in ones take none, and are not imported. Raises UserError as `check_verifiers`.
    """
    found = NO_FURTHER
    for name in names:
        if not _is_built_in(name):
            found |= signature_of(load_verifier(name), name).further
    return found


def signature_of(function: Verifier, name: str) -> Signature:
    """Return how a verifier is called. Raises UserError where it cannot be."""
    return Signature() if _is_built_in(name) else Signature.of(function, name)


def _is_built_in(name: str) -> bool:
    return name in NAMES or name.startswith("reasoning-gym:")


def check_answers(rows: Iterable[Row], reward: RewardConfig) -> None:
    """Raise UserError for a row whose answer is empty once blanks and the like around it are
    gone."""
    if "maths" not in reward.verifiers:
        return
    from megafork.answers.comparison import bare
    from megafork.answers.places import BOXED, gold_answer

    for row in rows:
        if not bare(gold_answer(row.answer, reward.places or BOXED)):
            raise UserError(
                f"{row.where}: reward.verifier=maths finds no answer in {row.answer[:60]!r}: mend "
                "or remove the row"
            )


def load_verifier(name: str, places: Sequence[str] | None = None) -> Verifier:
    """Return the function of one of NAMES, reasoning-gym:TASK or MODULE:FUNCTION.

    places: where one of FINDERS looks for the answer; None: where it does by itself.

    Raises UserError when there is none of that name or it cannot be imported.
    """
    head, _, tail = name.partition(":")
    if head == "reasoning-gym":
        from megafork.verifiers.reasoning_gym import task_verifier

        return task_verifier(tail)
    function = load_plugin(
        "reward.verifier", name, NAMES, spellings=_SPELLINGS, forms="reasoning-gym:TASK"
    )
    if places is not None and name in FINDERS:
        return functools.partial(function, places=places)
    return function


_SPELLINGS = {
    "math": "maths",
    "math-verify": "maths",
    "math_verify": "maths",
    "exact-match": "exact",
    "exact_match": "exact",
    "reasoning_gym": "reasoning-gym:TASK",
}
"""What people call them"""

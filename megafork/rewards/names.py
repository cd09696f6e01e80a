"""Verifiers by name or import path. Imports nothing heavy: every worker starts with it."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from megafork.errors import UserError

if TYPE_CHECKING:
    from megafork.config import RewardConfig
    from megafork.data.prompts import Row

Verifier = Callable[[str, str, str], float]
"""(prompt, response, answer) -> reward, 1.0 for a right response as a rule"""

NAMES = {
    "maths": "megafork.rewards.maths:verify",
    "countdown": "megafork.rewards.countdown:verify",
    "exact": "megafork.rewards.exact:verify",
}


FINDERS = ("maths", "exact")
"""Verifiers that take `places`, where an answer stands (answers/places.py)"""


def check_verifiers(names: Iterable[str]) -> None:
    """Raises UserError for the first that `load_verifier` does not find."""
    for name in names:
        load_verifier(name)


def check_answers(rows: Iterable[Row], reward: RewardConfig) -> None:
    """Raises UserError for a row whose answer is empty once what stands around it is gone."""
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
    """The function of one of NAMES, reasoning-gym:TASK or MODULE:FUNCTION.

    places: where one of FINDERS looks for the answer; None: where it does by itself.

    Raises UserError when there is none of that name or it cannot be imported.
    """
    head, colon, tail = name.partition(":")
    if head == "reasoning-gym":
        from megafork.rewards.reasoning_gym import task_verifier

        return task_verifier(tail)
    if not colon and name not in NAMES:
        near = difflib.get_close_matches(name.lower(), _SPELLINGS, n=1, cutoff=0.6)
        hint = f"did you mean {_SPELLINGS[near[0]]}? " if near else ""
        raise UserError(
            f"reward.verifier={name!r} is no verifier: {hint}There are {', '.join(NAMES)}, "
            "reasoning-gym:TASK, and any function as MODULE:FUNCTION"
        )
    module_name, _, function_name = NAMES.get(name, name).partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder; the console command has none
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        cause = str(error) or type(error).__name__
        raise UserError(f"reward.verifier={name!r} cannot be imported: {cause}") from error
    if not callable(function):
        raise UserError(f"reward.verifier={name!r} is a {type(function).__name__}, no function")
    if places is not None and name in FINDERS:
        return functools.partial(function, places=places)
    return function


_SPELLINGS = {name: name for name in NAMES} | {
    "math": "maths",
    "math-verify": "maths",
    "math_verify": "maths",
    "exact-match": "exact",
    "exact_match": "exact",
    "reasoning_gym": "reasoning-gym:TASK",
}
"""What people call them"""

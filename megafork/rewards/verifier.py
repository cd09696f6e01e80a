"""Verifiers: functions (prompt, response, answer) -> reward in 0..1, named by import path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from megafork.config import RewardConfig
from megafork.errors import UserError

Verifier = Callable[[str, str, str], float]


def load_verifier(path: str) -> Verifier:
    """The function MODULE:FUNCTION. Raises UserError when it cannot be imported."""
    module_name, colon, function_name = path.partition(":")
    if not colon:
        raise UserError(f"reward.verifier={path!r} is not of the form MODULE:FUNCTION")
    if os.getcwd() not in sys.path:  # a script's own folder; the console command has none
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward.verifier={path!r} cannot be imported: {error}") from None
    if not callable(function):
        raise UserError(f"reward.verifier={path!r} is a {type(function).__name__}, no function")
    return function


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one response."""

    reward: float
    accuracy: float
    """1.0: the response is right; else 0.0"""


class Judge:
    """A verifier together with the rule for calling a response right."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.verify = load_verifier(config.verifier)

    async def __call__(self, prompt: str, response: str, answer: str) -> Verdict:
        """Raises UserError when the verifier fails or gives no number.

        A reward that is not finite goes through: the update that it would spoil is skipped.
        """
        try:
            reward = float(self.verify(prompt, response, answer))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            hint = ""
            if "main thread" in str(error):  # signal.alarm, setitimer
                hint = " (verifiers run in a thread: a time limit by a signal cannot be set there)"
            raise UserError(
                f"reward.verifier={self.config.verifier} failed on the prompt {prompt[:60]!r}, "
                f"response {response[:60]!r}: {type(error).__name__}: {error}{hint}"
            ) from error
        return Verdict(reward, float(reward >= self.config.accuracy_at))

"""Signatures of verifiers: ours, and that of TRL's reward functions, which take lists.

    def verify(prompt, response, answer, **columns) -> float
    def reward(completions, **columns) -> list[float]

A parameter beyond these is a column of the row, by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from megafork.data.columns import Further
from megafork.errors import UserError

_LISTS = frozenset({"prompts", "completions"})
"""Lists that a function of TRL's signature is handed beside columns"""
_ONLY_TRLS = frozenset({"completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Names that TRL hands to a function and megafork does not"""


@dataclass(frozen=True)
class Signature:
    """The way in which a verifier is called."""

    takes_lists: bool = False
    """TRL's signature: all that it is handed are lists, here of one response"""
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    takes_all: bool = False
    """It has **columns"""
    own: frozenset[str] = frozenset()
    """Names of the parameters for prompt, response and answer, which no column can be handed to"""

    @classmethod
    def of(cls, function: Callable[..., Any], name: str) -> Signature:
        """Read the signature of the verifier `name`. Raises UserError for one that cannot be called
        with a response."""
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some functions of C tell none
            return cls()
        parameters = signature.parameters
        positional = [p.name for p in parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
        kinds = {p.kind for p in parameters.values()}
        takes_lists = "completions" in parameters
        own = frozenset() if takes_lists else frozenset(positional[:3])
        beyond = {name: p for name, p in parameters.items() if name not in own and _is_named(p)}
        required = {name for name, p in beyond.items() if p.default is Parameter.empty}
        fault = ""
        if inspect.iscoroutinefunction(function):
            fault = "is async"
        elif not takes_lists and len(own) < 3 and Parameter.VAR_POSITIONAL not in kinds:
            fault = f"takes {len(own)} values"
        elif any(beyond[name].kind == Parameter.POSITIONAL_ONLY for name in required):
            fault = "takes more than three values by position alone"
        elif takes_lists and required & _ONLY_TRLS:
            fault = f"needs {', '.join(sorted(required & _ONLY_TRLS))}, which it is not handed"
        if fault:
            raise UserError(
                f"reward.verifier={name!r}, with the parameters {signature}, {fault}: it must be a "
                "plain function that takes (prompt, response, answer, **columns) and returns a "
                "number, or, as in TRL, takes (completions, **columns) and returns a list of them"
            )
        takes_all = Parameter.VAR_KEYWORD in kinds
        return cls(takes_lists, frozenset(required), frozenset(beyond) - required, takes_all, own)

    @property
    def further(self) -> Further:
        """The columns that it takes; of TRL's signature also prompt, which is a chat's turns."""
        if not self.takes_lists:
            return Further(self.required, self.optional, self.takes_all)
        required = self.required - _LISTS - {"answer"}
        optional = (self.required | self.optional | {"prompt"}) - required - _LISTS - _ONLY_TRLS
        return Further(required, optional, self.takes_all)

    def call(
        self,
        function: Callable[..., Any],
        question: Sequence[str],
        columns: Mapping[str, Any],
    ) -> float:
        """Return the function's score. question: prompt, response and answer."""
        if not self.takes_lists:
            return float(function(*question, **self._taken(columns)))
        prompt, response, answer = question
        handed = {"prompts": prompt, "completions": response, "answer": answer, **columns}
        if (turns := handed.pop("prompt", None)) is not None:  # TRL answers turns by a turn
            handed["prompts"] = turns
            handed["completions"] = [{"role": "assistant", "content": response}]
        lists = {name: [value] for name, value in self._taken(handed).items()}
        [score] = function(**lists)
        return float(score)

    def _taken(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the values that the function has a parameter for."""
        named = self.required | self.optional
        return {
            name: value
            for name, value in values.items()
            if name not in self.own and (self.takes_all or name in named)
        }


def _is_named(parameter: Parameter) -> bool:
    return parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

"""Columns of a row: known names for prompt, answer and id, and further ones for verifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megafork.errors import UserError

PROMPTS = (("prompt", "problem", "question"), ("query", "instruction", "input"))
"""Names of the prompt's column, the likeliest first; those of one group are equally likely"""
ANSWERS = (
    ("answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth"),
    ("solution",),
)
"""Names of the answer's column, in the same order: a whole solution is the last choice"""
IDS = ("id", "unique_id", "problem_id", "question_id", "uuid", "extra_info.index")
"""Names of the column that tells problems apart, the likeliest first"""


@dataclass(frozen=True)
class Further:
    """Columns that verifiers take beside prompt, response and answer."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    takes_all: bool = False

    def __or__(self, other: Further) -> Further:
        return Further(
            self.required | other.required,
            self.optional | other.optional,
            self.takes_all or other.takes_all,
        )


NO_FURTHER = Further()


@dataclass(frozen=True)
class Wanted:
    """Columns to read of a table: at least one of each of `choices`, and `also` where it has those.

    Names with dots lead into nested columns. everything: all columns.
    """

    choices: tuple[tuple[str, ...], ...]
    also: frozenset[str] = frozenset()
    everything: bool = False

    def of(self, names: Sequence[str]) -> list[str]:
        """Return the top-level columns to read of a table that has `names`; all of them where a
        choice has none, so that a message can name them."""

        def found(keys: Sequence[str] | frozenset[str]) -> set[str]:
            return {key if key in names else key.split(".")[0] for key in keys} & set(names)

        chosen = [found(keys) for keys in self.choices]
        if self.everything or not all(chosen):
            return list(names)
        kept = found(self.also).union(*chosen)
        return [name for name in names if name in kept]


def look_up(row: dict[str, Any], key: str) -> Any:
    """Return row[key], or the nested value that a dotted key leads to. Raises KeyError."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def has(row: dict[str, Any], key: str) -> bool:
    """Return whether `look_up` finds the key."""
    try:
        look_up(row, key)
    except KeyError:
        return False
    return True


def choose(row: Any, groups: Sequence[Sequence[str]], setting: str, where: str) -> str:
    """Return the name in `groups` that a file's first row has, of the first group that it has any
    of.

    Raises UserError where there is none, or where two of one group hold different values: the user
    has to say by `setting` which is meant.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: the row is not an object with columns")
    for names in groups:
        found = [name for name in names if has(row, name)]
        if any(look_up(row, name) != look_up(row, found[0]) for name in found[1:]):
            raise UserError(
                f"{where}: {setting} is unset, and it could be any of {', '.join(found)}: say "
                f"which, as in {setting}={found[0]}"
            )
        if found:
            return found[0]
    known = ", ".join(name for names in groups for name in names)
    raise UserError(
        f"{where}: no column {groups[0][0]!r}, nor another of {known} (it has {listed(row)}): set "
        f"{setting}"
    )


def listed(row: dict[str, Any]) -> str:
    """Return the names of a row's columns for a message."""
    return ", ".join(map(repr, row)) or "none"

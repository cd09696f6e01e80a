"""Functions that a setting names: built-in ones, those of installed packages, any by import path.

Imports nothing heavy: every worker that judges responses starts with it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from megafork.errors import UserError

ENTRY_POINTS = "megafork."
"""A package offers a plug-in by an entry point of the group megafork.SETTING, for instance
megafork.algorithm.objective: its name is what users write, its value the MODULE:FUNCTION."""


def load_plugin(
    setting: str,
    value: str,
    built_ins: Mapping[str, str],
    *,
    spellings: Mapping[str, str] | None = None,
    forms: str = "",
) -> Callable[..., Any]:
    """Return the function that `setting=value` names.

    value: a name of built_ins (name -> MODULE:FUNCTION), of an entry point of the group
    `megafork.SETTING`, or MODULE:FUNCTION; the working directory is searched for modules too.
    spellings: other names that people use, for the hint; forms: further ways to write a value.
    Raises UserError, with the nearest name, for a name that is unknown, a module that cannot be
    imported and what is no function.
    """
    path = find_plugin(setting, value, built_ins, spellings=spellings, forms=forms)
    module_name, _, function_name = path.partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder; the console command has none
        sys.path.insert(0, os.getcwd())
    try:
        function = importlib.import_module(module_name)
        for name in function_name.split("."):
            function = getattr(function, name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        cause = str(error) or type(error).__name__
        raise UserError(f"{setting}={value!r} cannot be imported: {cause}") from error
    if not callable(function):
        raise UserError(f"{setting}={value!r} is a {type(function).__name__}, no function")
    return function


def find_plugin(
    setting: str,
    value: str,
    built_ins: Mapping[str, str],
    *,
    spellings: Mapping[str, str] | None = None,
    forms: str = "",
    counterpart: str = "",
) -> str:
    """Return the MODULE:FUNCTION of a value without importing it, as `load_plugin` finds it.

    counterpart: what to write for the value, should it be unknown; empty: the nearest name.
    """
    if value in built_ins:
        return built_ins[value]
    if ":" in value:
        return value
    offered = _offered(setting)
    if value in offered:
        return offered[value].value
    known = [*built_ins, *offered]
    spelled = {name: name for name in known} | dict(spellings or {})
    near = difflib.get_close_matches(value.lower(), spelled, n=1, cutoff=0.6)
    hint = f"did you mean {spelled[near[0]]}? " if near else ""
    hint = f"{counterpart}. " if counterpart else hint
    choices = ", ".join([*known, *([forms] if forms else [])])
    rest = f"There are {choices}, and any" if choices else "It takes any"
    raise UserError(f"{setting}={value!r} is unknown: {hint}{rest} function as MODULE:FUNCTION")


def _offered(setting: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS + setting)}

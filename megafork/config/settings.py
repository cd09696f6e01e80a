"""The catalogue of settings: each one's type, default, choices, bounds and meaning, as text.

Read from the fields of the config, so that `megafork keys` and the settings reference say what
holds.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megafork.config.learning import Section
from megafork.errors import UserError

REQUIRED, UNSET = "required", "unset"
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Setting:
    """A setting of a command, as text for people; its values are spelled as in an override."""

    key: str
    """section.name"""
    type: str
    """int, float, bool, str, list[...], or two of them, as in "str or list[str]\""""
    default: str
    """A value; "unset" where no value is one; "required" where there is no default"""
    choices: tuple[str, ...]
    """The values that it takes; MODULE:FUNCTION stands for any import path; (): not a choice"""
    bounds: str
    """As in "> 0, <= 1", of each element where the type is a list; empty: unbounded"""
    meaning: str

    @property
    def values(self) -> str:
        """The type with the choices or the bounds."""
        if not self.choices:
            return " ".join(filter(None, (self.type, self.bounds)))
        listed = " | ".join(self.choices)
        return listed if self.type == "str" else f"{self.type}: {listed}"

    def text(self) -> str:
        """Two lines or more for a terminal: key, default and values; the meaning below, wrapped."""
        first = f"{self.key:31} {self.default:14} {self.values}"
        return first + "\n" + textwrap.indent(textwrap.fill(self.meaning, 92), "    ")


def known_settings(kind: type[Section], prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a config, depth first."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from known_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield Setting(
                key=prefix + name,
                type=_type(field.annotation),
                default=_default(field),
                # Names beside import paths are the examples of a field that takes any text.
                choices=tuple(
                    dict.fromkeys([*_choices(field.annotation), *(field.examples or [])])
                ),
                bounds=", ".join([*_bounds(field.metadata), *_bounds_inside(field.annotation)]),
                meaning=field.description or "",
            )


def named_by(words: Sequence[str], settings: Sequence[Setting], command: str) -> list[Setting]:
    """Return the settings whose key holds every word; if none does, those whose text does.

    Raises UserError, with the nearest keys, where there are none.
    """
    lowered = [word.lower() for word in words]
    found = [s for s in settings if all(word in s.key for word in lowered)]
    found = found or [s for s in settings if all(word in s.text().lower() for word in lowered)]
    if not found:
        near = [key for word in lowered for key in nearest(word, [s.key for s in settings], 3)]
        hint = f"the nearest are {', '.join(near)}; " if near else ""
        raise UserError(
            f"no setting of `megafork {command}` is named or described by {' '.join(words)!r}: "
            f"{hint}`megafork keys {command}` lists them all"
        )
    return found


def nearest(word: str, keys: Sequence[str], number: int = 1) -> list[str]:
    """Return the keys and sections that `word` is likely to stand for, the likeliest first.

    They are spelled like it; else their last part is its last part, or is spelled like that.
    """
    sections = sorted({key.split(".")[0] for key in keys})
    if near := difflib.get_close_matches(word, [*keys, *sections], n=number, cutoff=0.5):
        return near
    leaves = [key.split(".")[-1] for key in keys]
    leaf = word.split(".")[-1]
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, n=number)
    return [key for name in near for key in keys if key.split(".")[-1] == name][:number]


def spelled(value: Any) -> str:
    """Return a value as an override spells it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    if field.default_factory is not None or field.default is None:
        return UNSET
    return spelled(field.default)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in arguments if a is not NoneType))
    if origin is Literal:
        return type(arguments[0]).__name__
    if origin in (list, tuple):
        return f"list[{_type(arguments[0])}]"
    return str(annotation.__name__)


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(spelled, get_args(annotation))
    elif get_origin(annotation) is not None:
        for argument in get_args(annotation):
            yield from _choices(argument)


def _bounds_inside(annotation: Any) -> Iterator[str]:
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from _bounds(arguments[1:])
    for argument in arguments:
        if get_origin(argument) is not None:
            yield from _bounds_inside(argument)


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _bounds(item.metadata)
        for name, sign in _SIGNS.items():
            if (bound := getattr(item, name, None)) is not None:
                yield f"{sign} {bound:g}"
        if getattr(item, "min_length", None) == 1:
            yield "not empty"

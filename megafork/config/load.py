"""Settings from TOML files and `section.key=value` overrides; the resolved ones go with the run."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import ValidationError

from megafork.config import GenerateConfig, Section, TrainConfig
from megafork.config.counterparts import counterpart
from megafork.config.settings import known_settings, nearest
from megafork.errors import UserError
from megafork.system.disk import naming, sync

C = TypeVar("C", bound=Section)
_PREFIX = "MEGAFORK_"


def load_config(kind: type[C], toml_path: str | Path | None, overrides: Sequence[str]) -> C:
    """Read `toml_path` (None: no file), apply `section.key=value` overrides, validate.

    Raises UserError that names the file or override, the key, the value and the nearest known key;
    also for an environment variable that stands for a setting, which would have no effect.
    """
    _refuse_variables(kind)
    raw: dict[str, Any] = {}
    source = "the command line"
    if toml_path is not None:
        source = str(toml_path)
        try:
            raw = tomllib.loads(Path(toml_path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"config file {toml_path} does not exist") from None
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"config file {toml_path} cannot be read: {error}") from None
    for override in overrides:
        _apply_override(raw, override)
    if toml_path is not None and overrides:
        source += " and the command line"
    try:
        config = kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(kind, error, source)) from None
    if isinstance(config, TrainConfig | GenerateConfig):
        config.check()
    return config


def save_config(config: Section, path: Path) -> None:
    """Write the resolved config as TOML; `load_config` reads it back to an equal object."""
    partial = path.with_name(path.name + ".partial")
    with naming(partial):
        partial.write_text(tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    sync(partial)
    partial.replace(path)  # whole at every moment: a resumed run reads it


def settings_of(config: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the (dotted key, value) pairs of a config, depth first."""
    for name, value in config:
        if isinstance(value, Section):
            yield from settings_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _refuse_variables(kind: type[Section]) -> None:
    """Raise UserError for $MEGAFORK_SECTION_NAME and $MEGAFORK_SECTION__NAME of a setting.

    With two underlines behind a section the name may be misspelt. Others are not of settings.
    """
    keys = [setting.key for setting in known_settings(kind)]
    plain = {key.replace(".", "_"): key for key in keys}
    sections = {key.split(".")[0] for key in keys}
    for name, value in os.environ.items():
        if not name.startswith(_PREFIX):
            continue
        said = name.removeprefix(_PREFIX).lower()
        key = plain.get(said) or plain.get(said.replace("__", "_"))
        if key is None and said.split("__")[0] in sections and "__" in said:
            key = nearest(said.replace("__", "."), keys)[0]
        if key is not None:
            raise UserError(
                f"environment variable {name}={value}: settings are not read from the environment; "
                f"write {key}={shlex.quote(value)} behind the command, or in its TOML file, and "
                f"unset {name}"
            )


def _needed(kind: type[Section], where: Sequence[int | str]) -> list[str]:
    """Return the key that is missing; for a whole section, its keys that have no default."""
    key = ".".join(map(str, where))
    field: Any = kind
    for name in where:
        field = field.model_fields[str(name)].annotation
        if not (isinstance(field, type) and issubclass(field, Section)):
            return [key]
    return [f"{key}.{name}" for name, sub in field.model_fields.items() if sub.is_required()]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    *sections, leaf = key.split(".")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    # So is a date: no setting is one, but many a folder is named by one.
    table[leaf] = value if isinstance(value, bool | int | float | str | list) else text


def _explain(kind: type[Section], error: ValidationError, source: str) -> str:
    keys = [setting.key for setting in known_settings(kind)]
    lines = []
    for problem in error.errors():
        if problem["type"] == "default_factory_not_called":  # of another key's mistake
            continue
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = nearest(key, keys)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(keys)}"
            meant = counterpart(near[0], problem["input"]) if near else ""
            lines.append(f"unknown key {key}{hint}" + (f" {meant}" if meant else ""))
        elif problem["type"] == "missing":
            needed = _needed(kind, problem["loc"])
            lines += [f"{k} is missing: set it in the file or as {k}=VALUE" for k in needed]
        else:
            meant = counterpart(key, problem["input"])
            rest = f" ({meant})" if meant else ""
            lines.append(f"{key}={problem['input']!r}: {problem['msg']}{rest}")
    return f"config from {source}: " + "; ".join(lines)

"""Samples on disk: group by group as they finish, in the input's order when all are there."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from megafork.errors import UserError
from megafork.system.disk import cut_torn_line, naming, sync
from megafork.system.parsing import parse_json

Settings = dict[str, Any]
SETTINGS = ".settings.json"
PROMPTS = "prompts"
"""The setting that tells the file's prompts from others"""
_READING = {f"data.{key}" for key in ("prompt_key", "answer_key", "id_key", "too_long", "reader")}
"""Settings of how prompts were found: what was found is in PROMPTS"""


class _Line(msgspec.Struct):
    """A line of PATH.partial: the rows of one group."""

    group: int
    rows: list[dict[str, Any]]


class SampleFile:
    """PATH, a jsonl of rows; until all groups are there, PATH.partial.

    PATH.settings.json says what the rows were made with: an interrupted file is gone on with, and
    a complete one taken as it is, by the same settings alone.
    """

    def __init__(self, path: Path, settings: Settings, num_groups: int) -> None:
        """Read what is there and write nothing.

        Raises UserError when the file was made with other settings.
        """
        self.path, self.settings, self.num_groups = path, settings, num_groups
        self.is_complete = path.exists()
        self.partial = path.with_name(path.name + ".partial")
        self.settings_path = path.with_name(path.name + SETTINGS)
        self._offsets: dict[int, int] = {}
        self._check_settings()

    def missing(self) -> list[int]:
        """Groups that are not on disk; the file must be open."""
        if self.is_complete:
            return []
        return [group for group in range(self.num_groups) if group not in self._offsets]

    def _check_settings(self) -> None:
        kept = files_with_samples(self.path)
        if not kept:
            return
        if not self.settings_path.exists():
            raise UserError(
                f"{kept[0]} exists, without the {self.settings_path.name} that says how it was "
                "made: remove it or name another file"
            )
        check_same(read_settings(self.settings_path), self.settings, str(kept[0]))

    def _scan(self) -> Iterator[tuple[int, int]]:
        """(group, where its line begins)"""
        with self.partial.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                try:
                    yield msgspec.convert(parse_json(line), _Line).group, start
                except ValueError as error:  # a ValidationError is one
                    raise UserError(
                        f"{self.partial}, line {number} is damaged ({error}): remove the line to "
                        "generate its group again"
                    ) from None
                start += len(line)

    def open(self) -> None:
        """Lock the file and find what it holds; comes before `missing` and `append`.

        Raises UserError when another process has it open.
        """
        if self.is_complete:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("ab")
        except OSError as error:
            raise UserError(
                f"{self.partial} cannot be written ({error.strerror}): name another --output, or "
                "make this one writable"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{self.partial} is being written by another process") from None
        write_json(self.settings_path, self.settings)  # before the first sample, which it tells of
        cut_torn_line(self.partial)
        self._offsets = dict(self._scan())
        self._file.seek(0, os.SEEK_END)
        self._complete_if_all()

    def append(self, group: int, rows: list[dict[str, Any]]) -> None:
        """Write the rows of one group and wait for the disk; the last group completes the file."""
        line = json.dumps({"group": group, "rows": rows}, ensure_ascii=False)
        start = self._file.tell()
        with naming(self.partial):
            self._file.write(line.encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._offsets[group] = start
        self._complete_if_all()

    def close(self) -> None:
        if not self.is_complete:
            with naming(self.partial):
                self._file.close()

    def _complete_if_all(self) -> None:
        if len(self._offsets) < self.num_groups:
            return
        self.rewrite(self._ordered())
        self._file.close()
        self.partial.unlink()
        self.is_complete = True

    def _ordered(self) -> Iterator[dict[str, Any]]:
        with self.partial.open("rb") as source:
            for group in range(self.num_groups):
                source.seek(self._offsets[group])
                yield from parse_json(source.readline())["rows"]

    def rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        """Make these the complete file's rows; what was there stays until all are on disk."""
        ordered = self.path.with_name(self.path.name + ".ordered.partial")
        with naming(ordered), ordered.open("wb") as target:
            for row in rows:
                target.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            target.flush()
            os.fsync(target.fileno())
        ordered.replace(self.path)
        sync(self.path.parent)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the complete file, in the input's order."""
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                yield parse_json(line)


def files_with_samples(path: Path) -> list[Path]:
    """PATH and PATH.partial where they hold samples.

    A start that came to nothing leaves an empty PATH.partial, which holds none.
    """
    partial = path.with_name(path.name + ".partial")
    begun = partial.exists() and partial.stat().st_size > 0
    return [path] * path.exists() + [partial] * begun


def check_same(before: Settings, now: Settings, what: str) -> None:
    """Raise UserError where samples would be mixed with those of other settings.

    Prompts are compared where both have them.
    """
    names = {*before, *now} - _READING
    if PROMPTS not in before or PROMPTS not in now:
        names -= {PROMPTS}
    other = [name for name in sorted(names) if before.get(name) != now.get(name)]
    if other:
        shown = "; ".join(
            f"{name}: {_short(before.get(name))} then, {_short(now.get(name))} now"
            for name in other
        )
        raise UserError(
            f"{what} holds samples that were made with other settings ({shown}): give those again "
            "to go on with it, or another --output"
        )


def read_settings(path: Path) -> Settings:
    try:
        return msgspec.convert(parse_json(path.read_text(encoding="utf-8")), Settings)
    except ValueError as error:
        raise UserError(
            f"{path} is not what was written there ({error}): remove it and the samples beside it"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; the file has its name only when it is whole."""
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with naming(partial):
        partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-12:]}"

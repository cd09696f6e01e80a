"""The finished groups of a step, on disk before they are used: a resumed step replays them.

One JSON object per line, a `types.Group` with its samples. Python writes a float's shortest exact
form, so log-probabilities come back bit for bit (and a verifier's NaN as NaN, which strict JSON
does not have). Each data-parallel replica has a file of its own for the groups that it generates.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec

from megafork.disk import cut_torn_line, naming, sync
from megafork.errors import UserError
from megafork.parsing import parse_json
from megafork.types import Group

_log = logging.getLogger(__name__)


class Journal:
    """Appends groups to `path`; each is on disk when `append` returns.

    A torn last line, left by a crash in the middle of a write, is cut off on opening.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        self._file = self.path.open("ab")
        sync(self.path.parent)  # the file's name must survive too

    def append(self, group: Group) -> None:
        """Write one finished group and wait for the disk."""
        # Not dataclasses.asdict, which copies token by token and takes twice as long.
        fields = vars(group) | {"samples": [vars(sample) for sample in group.samples]}
        with naming(self.path):
            self._file.write(json.dumps(fields, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming(self.path):  # a full disk fails once more, with what it had no room for
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @staticmethod
    def read(path: str | Path) -> list[Group]:
        """All groups, in the order they finished; empty when there is no such file.

        Raises UserError as `each` does.
        """
        return list(Journal.each(path)) if Path(path).exists() else []

    @staticmethod
    def each(path: str | Path) -> Iterator[Group]:
        """The same, one at a time.

        A torn last line is dropped with a warning. Raises UserError, naming file and line, when
        any other line is damaged.
        """
        path = Path(path)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _parse(line, path, number)
                else:
                    _log.warning("%s:%d: dropped a group not written to its end", path, number)


def of_replica(path: Path, replica: int) -> Path:
    """The replica's own file beside the first one's, which has the plain name."""
    return path.with_stem(f"{path.stem}-replica{replica}") if replica else path


def journal_path(folder: Path, step: int, replica: int = 0) -> Path:
    return of_replica(folder / f"step_{step:06d}.jsonl", replica)


def journals_of(folder: Path, step: int) -> list[Path]:
    """A step's files, of however many replicas the run had then."""
    later = sorted(folder.glob(f"step_{step:06d}-replica*.jsonl"))
    return [path for path in [journal_path(folder, step), *later] if path.exists()]


def read_step(
    folder: Path, step: int, wanted: Callable[[int], bool] = lambda prompt_index: True
) -> dict[int, Group]:
    """A step's groups by prompt index, those that are `wanted`.

    Of one that was judged again (by a replica that may have another file) the version that is
    finite, then the one with the fewest failed verdicts, the last of equals. Raises UserError as
    `Journal.each` does.
    """
    found: dict[int, Group] = {}
    for path in journals_of(folder, step):
        for group in Journal.each(path):
            if not wanted(group.prompt_index):
                continue
            before = found.get(group.prompt_index)
            if before is None or _faults(group) <= _faults(before):
                found[group.prompt_index] = group
    return found


def _faults(group: Group) -> tuple[bool, int]:
    return not group.is_finite, sum(sample.failure is not None for sample in group.samples)


def _parse(line: bytes, path: Path, number: int) -> Group:
    try:
        group = msgspec.convert(parse_json(line), Group)
    except ValueError as error:  # a ValidationError is one
        raise _damage(path, number, str(error)) from error
    if any(len(sample.token_ids) != len(sample.logprobs) for sample in group.samples):
        raise _damage(path, number, "a response with another number of log-probabilities")
    return group


def _damage(path: Path, number: int, cause: str) -> UserError:
    return UserError(
        f"{path}:{number} is damaged ({cause}); delete the file to generate the step's groups again"
    )

"""The finished groups of a step, on disk before they are used: a resumed step replays them.

A file is a sequence of frames (rollout/frames.py), one for a group: in the header all but its
tokens, then int32 prompt ids, int32 token ids and float32 log-probabilities of all its samples in
turn. Files of former versions are still read: one of each data-parallel replica
(`step_000001-replica1.journal`), and those of JSON lines (`.jsonl`).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec
import numpy as np

from megafork.data.sample import Group, Sample
from megafork.errors import UserError
from megafork.rollout.frames import MAGIC, PREFIX_BYTES, Damaged, Prefix, encode
from megafork.system.disk import naming, sync
from megafork.system.parsing import parse_json

_log = logging.getLogger(__name__)
SUFFIX, FORMER_SUFFIX = ".journal", ".jsonl"
_BLOCK = 1 << 20
_GROUP_FIELDS = ("prompt_index", "policy_version", "is_whole")
_SAMPLE_FIELDS = ("uid", "truncated", "aborted", "reward", "accuracy", "failure", "versions")
"""In a record's header: all but the arrays"""


@dataclass(frozen=True)
class Damage:
    """A record that is not what was written."""

    path: Path
    offset: int
    """The offset of its first byte in the file"""
    prompt_index: int | None
    """None if the header, which names the prompt, is damaged"""
    cause: str

    def __str__(self) -> str:
        which = "a record" if self.prompt_index is None else f"prompt {self.prompt_index}'s group"
        return f"{self.path}, byte {self.offset}: {which} is damaged ({self.cause})"


class Journal:
    """Appends groups to `path`; each is on disk when `append` returns.

    A torn last record, left by a crash in the middle of a write, is cut off on opening.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        with naming(self.path):
            self._file.truncate(end_of_records(self.path))
        sync(self.path.parent)  # the file's name must survive too

    def append(self, group: Group) -> None:
        """Write one finished group and wait for the disk."""
        with naming(self.path):
            self._file.writelines(_encoded(group))
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
        """Return all groups, in the order they finished; none when there is no such file.

        Raises UserError as `each` does.
        """
        return list(Journal.each(path)) if Path(path).exists() else []

    @staticmethod
    def each(
        path: str | Path, damaged: Callable[[Damage], object] | None = None
    ) -> Iterator[Group]:
        """Yield all groups in the order they finished. A torn last record is a warning.

        damaged: is called with each damaged record, which is left out; by default a warning is
        logged.
        Raises UserError, naming file and line, for damage to a file of the former format.
        """
        path = Path(path)
        if path.suffix == FORMER_SUFFIX:
            yield from _each_line(path)
            return
        tell = damaged or (lambda damage: _log.warning("%s; it is left out", damage))
        for found in _records(path):
            if isinstance(found, Damage):
                tell(found)
            else:
                yield found


def journal_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}{SUFFIX}"


def journals_of(folder: Path, step: int) -> list[Path]:
    """Return a step's files; there are several only if a former version began the run.

    Those of JSON lines come first, because they were written before the others.
    """
    name = re.compile(rf"step_{step:06d}(-replica\d+)?")
    files = [path for path in folder.glob(f"step_{step:06d}*") if name.fullmatch(path.stem)]
    return [
        path
        for suffix in (FORMER_SUFFIX, SUFFIX)
        for path in sorted(files, key=lambda path: (len(path.stem), path.stem))
        if path.suffix == suffix
    ]


def journalled_steps(folder: Path) -> list[int]:
    """Return the steps that have a file, ascending."""
    names = [
        re.match(r"step_(\d+)", path.name)
        for path in folder.glob("step_*")
        if path.suffix in (SUFFIX, FORMER_SUFFIX)
    ]
    return sorted({int(name[1]) for name in names if name})


def read_step(
    folder: Path,
    step: int,
    wanted: Callable[[int], bool] = lambda prompt_index: True,
    damaged: Callable[[Damage], object] | None = None,
) -> dict[int, Group]:
    """Read a step's groups by prompt index, those that are `wanted`.

    A group that was judged again is there several times. Its finite version is taken; of several
    the one with the fewest failed verdicts, and of equals the last. `damaged` and errors are those
    of `Journal.each`.
    """
    found: dict[int, Group] = {}
    for path in journals_of(folder, step):
        for group in Journal.each(path, damaged):
            if not wanted(group.prompt_index):
                continue
            before = found.get(group.prompt_index)
            if before is None or _faults(group) <= _faults(before):
                found[group.prompt_index] = replace(group, step=step)
    return found


def end_of_records(path: Path) -> int:
    """Return the number of bytes before a torn last record, or of the whole file without one."""
    with path.open("rb") as file:
        for position, _, is_torn in _places(file):
            if is_torn:
                return position
        return os.fstat(file.fileno()).st_size


def json_lines(path: Path, step: int | None = None) -> Iterator[str]:
    """Yield the groups of a run's folder, or of one journal file, each as a JSON object.

    step: the only step to take; None takes all. Raises UserError where there are none.
    """
    files = [path]
    if path.is_dir():
        folder = path / "rollouts"
        steps = journalled_steps(folder) if step is None else [step]
        files = [file for each in steps for file in journals_of(folder, each)]
    elif step is not None:
        raise UserError(f"--step {step}: {path} is one journal: name the run's folder")
    elif not path.exists() or path.suffix not in (SUFFIX, FORMER_SUFFIX):
        raise UserError(f"{path} is neither a run's folder nor a journal (*{SUFFIX})")
    if not files:
        raise UserError(f"{path / 'rollouts'} holds no journal" + (f" of step {step}" * bool(step)))
    for file in files:
        for group in Journal.each(file):
            samples = [
                {name: getattr(sample, name) for name in _SAMPLE_FIELDS}
                | {"token_ids": sample.token_ids.tolist(), "logprobs": sample.logprobs.tolist()}
                for sample in group.samples
            ]
            fields = {name: getattr(group, name) for name in _GROUP_FIELDS}
            yield json.dumps(fields | {"prompt_ids": group.prompt_ids, "samples": samples})


def _faults(group: Group) -> tuple[bool, int]:
    return not group.is_finite, sum(sample.failure is not None for sample in group.samples)


# ---------------------------------------------------------------------------- records


@dataclass(frozen=True)
class _Head:
    """A record's prefix and header, whose checksum was right."""

    prefix: Prefix
    fields: dict[str, Any]
    arrays: int
    """The offset of the arrays' first byte in the file"""

    @property
    def end(self) -> int:
        return self.arrays + self.prefix.arrays_bytes


def _encoded(group: Group) -> list[bytes | memoryview]:
    header: dict[str, Any] = {name: getattr(group, name) for name in _GROUP_FIELDS}
    header["samples"] = [
        {name: getattr(sample, name) for name in (*_SAMPLE_FIELDS, "num_tokens")}
        for sample in group.samples
    ]
    arrays = {
        "prompt_ids": [np.asarray(group.prompt_ids, np.int32)],
        "token_ids": [np.empty(0, np.int32), *(sample.token_ids for sample in group.samples)],
        "logprobs": [np.empty(0, np.float32), *(sample.logprobs for sample in group.samples)],
    }
    return encode(header, arrays)


def _records(path: Path) -> Iterator[Group | Damage]:
    """Yield groups and damage in the file's order; a torn last record is a warning."""
    with path.open("rb") as file:
        for position, head, is_torn in _places(file):
            if is_torn:
                _log.warning("%s, byte %d: dropped a group not written to its end", path, position)
            elif head is None:
                yield Damage(path, position, None, "its header is not what was written")
            else:
                yield _group(file, head, path, position)


def _places(file: BinaryIO) -> Iterator[tuple[int, _Head | None, bool]]:
    """Yield each record's first byte, its head (None: damaged), and whether it is torn.

    Only the last record can be torn: an end of the file within it tells.
    """
    size = os.fstat(file.fileno()).st_size
    position = 0
    while position < size:
        head = _head_at(file, position, size)
        if head is None:
            end = _next_record(file, position + 1, size)
            yield position, None, end == size
        else:
            end = head.end
            yield position, head, end > size
        position = end


def _head_at(file: BinaryIO, position: int, size: int) -> _Head | None:
    """Read the head of the record at `position`; None if none begins there, or it is damaged."""
    file.seek(position)
    try:
        prefix = Prefix.parse(file.read(PREFIX_BYTES))
        arrays = position + PREFIX_BYTES + prefix.header_bytes
        if arrays > size:
            return None
        return _Head(prefix, prefix.header(file.read(prefix.header_bytes)), arrays)
    except Damaged:
        return None


def _next_record(file: BinaryIO, position: int, size: int) -> int:
    """Find the first record at or after `position` with a whole header; `size` if there is none."""
    while position < size:
        file.seek(position)
        block = file.read(_BLOCK)
        found = block.find(MAGIC)
        if found < 0:
            position += max(1, len(block) - len(MAGIC) + 1)
        elif _head_at(file, position + found, size) is not None:
            return position + found
        else:
            position += found + 1
    return size


def _group(file: BinaryIO, record: _Head, path: Path, position: int) -> Group | Damage:
    file.seek(record.arrays)
    fields = dict(record.fields)
    try:
        arrays = record.prefix.arrays(fields, file.read(record.prefix.arrays_bytes))
    except Damaged as error:
        return Damage(path, position, fields["prompt_index"], str(error))
    del fields["arrays"]
    samples, start = [], 0
    for sample in fields.pop("samples"):
        rows = slice(start, start + sample["num_tokens"])
        start = rows.stop
        samples.append(
            Sample(token_ids=arrays["token_ids"][rows], logprobs=arrays["logprobs"][rows], **sample)
        )
    return Group(prompt_ids=arrays["prompt_ids"].tolist(), samples=samples, **fields)


# ------------------------------------------------------------------ the former format


class _FormerSample(msgspec.Struct):
    uid: int
    token_ids: list[int]
    logprobs: list[float]
    truncated: bool
    reward: float = 0.0
    accuracy: float = 0.0
    failure: str | None = None
    version_changes: list[int] = []
    """From each token on, the policy version is one more than before it."""


class _FormerGroup(msgspec.Struct):
    prompt_index: int
    prompt_ids: list[int]
    policy_version: int
    samples: list[_FormerSample]
    is_whole: bool = True


def _each_line(path: Path) -> Iterator[Group]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                _log.warning("%s:%d: dropped a group not written to its end", path, number)
                continue
            try:
                yield _of_former(msgspec.convert(parse_json(line), _FormerGroup))
            except (ValueError, OverflowError) as error:  # a ValidationError is a ValueError
                raise UserError(
                    f"{path}:{number} is damaged ({error}); delete the file to generate the "
                    "step's groups again"
                ) from error


def _of_former(group: _FormerGroup) -> Group:
    samples = []
    for former in group.samples:
        fields = msgspec.structs.asdict(former)
        versions = {0: group.policy_version}
        for change, first in enumerate(fields.pop("version_changes"), start=1):
            versions[first] = group.policy_version + change  # the last of several at one token
        runs = [(version, first) for first, version in versions.items()]
        samples.append(Sample(**fields, versions=runs))
    return Group(
        group.prompt_index, group.prompt_ids, group.policy_version, samples, group.is_whole
    )

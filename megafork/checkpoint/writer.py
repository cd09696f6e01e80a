"""The forked process that writes a rank's part of a checkpoint while the rank goes on."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import stat
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncRequest,
    TemporalAsyncCaller,
)
from torch import Tensor

from megafork.checkpoint.files import checksum, write_and_sync
from megafork.parallel.unpickling import SafeUnpickler
from megafork.system.child_process import die_with_parent

_CHECKSUMS = "checksums"


class _Results:
    """The messages of a forked process, in a file that it and the rank have open.

    megatron's queue is a server process of its own, which outlives a rank that is killed.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115, it stays open for both

    def put(self, value: Any) -> None:
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the message. Raises queue.Empty when none was written to its end."""
        self._file.seek(0)
        try:
            return SafeUnpickler(self._file).load()
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


class _Uncopied(Tensor):
    """A tensor that megatron takes as it is.

    torch.save writes the whole storage of a view, so megatron copies every view when a save is
    begun: most of a model. `_write` copies them too, but one at a time.
    """

    def clone(self, **_: Any) -> Tensor:
        return self


def without_copies(contents: dict[str, Any]) -> None:
    """Let megatron refer to what is to be saved, which may not change until `Writer` is made."""
    for part in nested_values(contents):
        if isinstance(part, ShardedTensor | ShardedTensorFactory):
            part.data = part.data.detach().as_subclass(_Uncopied)


def renew_results() -> None:
    """Replace the queue that megatron takes; call it before a save is begun."""
    filesystem_async._results_queue = _Results()


class Writer:
    """Runs the writing half of a request; all ranks make one and call its methods together."""

    def __init__(self, request: AsyncRequest) -> None:
        self.finalize = request.finalize_fns
        if request.async_fn is not None:  # this rank has something to write
            transforms = request.async_fn.args[0]
            request = request._replace(async_fn=partial(_write, os.getpid(), transforms))
        self._caller = TemporalAsyncCaller()
        self._caller.schedule_async_call(request)
        self._process = self._caller.process

    def is_done(self, *, wait: bool) -> bool:
        """Return whether every rank's process has ended."""
        return self._caller.is_current_async_call_done(blocking=wait)

    @property
    def exit_status(self) -> int:
        """The exit status of this rank's process, once it has ended: -9 after kill -9."""
        return self._process.exitcode if self._process is not None else 0


def _write(
    trainer: int, transforms: list[Any], rank: int, buckets: list[Any], results: Any
) -> None:
    """Write one file after the other, in this process.

    megatron-core 0.16 forks once more for each file, and waits for ever for one that was killed.
    A process that outlived its trainer could write into the folder of the resumed run.
    """
    die_with_parent(trainer)
    if sys.platform.startswith("linux"):
        _let_go_of_connections()
    written: queue.Queue = queue.Queue()
    begun: queue.Queue = queue.Queue()
    for index, (path, key, (objects, tensors)) in enumerate(buckets):
        begun.put(index)
        one_by_one = ((item, tensor.as_subclass(Tensor).clone()) for item, tensor in tensors)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, (path, key, (objects, one_by_one)), written, begun, use_fsync=True
        )
    outcomes = dict(written.get() for _ in buckets)
    failures = [
        OSError(f"{buckets[index][0]}: {outcome}")
        for index, outcome in outcomes.items()
        if isinstance(outcome, Exception)
    ]
    if not failures:
        try:
            _leave_checksums(rank, [Path(bucket[0]) for bucket in buckets])
        except OSError as error:
            failures.append(error)
    results.put(failures[0] if failures else outcomes)


def _let_go_of_connections() -> None:
    """Give up the sockets and pipes that this fork has from the trainer.

    Whoever waits for the end of one would wait until the checkpoint is written. They become
    /dev/null, so that no file of this process gets their numbers.
    """
    with open(os.devnull, "r+b") as nothing:
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the listing's own is closed by now
                mode = os.fstat(int(name)).st_mode
                if int(name) > 2 and (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
                    os.dup2(nothing.fileno(), int(name))


def _leave_checksums(rank: int, files: Sequence[Path]) -> None:
    """Write the checksums of this rank's files, so that the trainer need not read them all
    again."""
    sums = {path.name: checksum(path) for path in files}
    path = files[0].with_name(f"{_CHECKSUMS}_{rank:05d}.json")
    write_and_sync(path, json.dumps(sums).encode())


def take_checksums(folder: Path) -> dict[str, tuple[int, int]]:
    """{file: (size, CRC-32)} of all that the ranks' processes have written to `folder`."""
    sums: dict[str, tuple[int, int]] = {}
    for path in folder.glob(f"{_CHECKSUMS}_*.json"):
        sums |= {name: (size, crc) for name, (size, crc) in json.loads(path.read_text()).items()}
        path.unlink()
    return sums

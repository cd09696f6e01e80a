"""The progress of ranks: when a collective fails, those that did not come to it are named."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from megafork.errors import PeerError
from megafork.system import failure_file
from megafork.system.rendezvous import STORE

_GRACE_S = 5.0
"""One rank's failure closes its connections: whoever waits too says so within moments."""
_LOOK_S = 0.05


class Board(Protocol):
    """The part of a torch.distributed.Store that is needed here."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class FileBoard:
    """A folder with a file for each key, since a FileStore keeps every value that a key has ever
    had."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, key: str, value: str) -> None:
        partial = self._path(f"{key}.{os.getpid()}")
        partial.write_text(value)
        partial.replace(self._path(key))

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def check(self, keys: list[str]) -> bool:
        return all(self._path(key).exists() for key in keys)

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "-")


def board_of_the_world() -> Board:
    """Return a board beside the store's file where the world has one, else in the store itself."""
    if STORE in os.environ:
        return FileBoard(Path(os.environ[STORE]).parent)
    return dist.PrefixStore("megafork/whereabouts", dist.distributed_c10d._get_default_store())


class Progress:
    """A board that needs no collective to be written or read.

    gloo's failures are caught here; NCCL's watchdog ends the process by itself, with its own words.
    """

    def __init__(self, rank: int, world_size: int, timeout_minutes: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_minutes = timeout_minutes
        self._board = board_of_the_world()
        self.enter("start")

    def enter(self, where: str) -> None:
        """Write down what this rank does from now on."""
        self._where = where
        self._board.set(f"at/{self.rank}", f"{time.time()} {where}")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise PeerError, with the ranks that did not come, where a collective inside it fails by
        a peer."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not failure_file.follows_from_a_peer(error):
                raise
            try:
                message = self._message(error)
            except RuntimeError:  # the process that has the store is the one that is lost
                message = f"in {self._where} another rank was lost: {error}"
            raise PeerError(message) from error

    def _message(self, error: RuntimeError) -> str:
        now = time.monotonic()
        self._board.set(f"waits/{self.rank}", "")
        while (absent := self._absent()) and time.monotonic() - now < _GRACE_S:
            time.sleep(_LOOK_S)
        seen = map(self._last_seen, absent)
        who = "; ".join(seen) or "Every rank waits for another: is the network whole?"
        return (
            f"in {self._where} a collective failed (parallel.timeout_minutes="
            f"{self.timeout_minutes:g}). {who}. "
            f"Look at these processes (py-spy dump --pid), or allow more time. {error}"
        )

    def _absent(self) -> list[int]:
        """Return the ranks that wait in no collective that has failed."""
        return [r for r in range(self.world_size) if not self._board.check([f"waits/{r}"])]

    def _last_seen(self, rank: int) -> str:
        since, where = self._board.get(f"at/{rank}").decode().split(" ", 1)
        seconds = time.time() - float(since)
        return f"Rank {rank} did not come; it has been in {where} for {seconds:.0f} s"

"""Who is where: when a collective fails, the ranks that did not come to it are named."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from megafork import last_words
from megafork.errors import PeerError
from megafork.rendezvous import STORE

_TIMED_OUT = re.compile("timed? ?out", re.IGNORECASE)
_BROKEN = re.compile("closed by peer|connection reset|broken pipe|aborted", re.IGNORECASE)
_GRACE_S = 5.0
"""One rank's failure closes its connections, so the others that wait fail within moments."""


class Board(Protocol):
    """The part of a torch.distributed.Store that is needed here."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...


class FileBoard:
    """A file for each key, since a FileStore keeps every value that a key has ever had."""

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

    def add(self, key: str, amount: int) -> int:
        """The sum of all amounts, each a byte of the file."""
        with self._path(key).open("ab") as file:
            file.write(b"+" * amount)
            file.flush()
            return file.tell()

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "-")


def board_of_the_world() -> Board:
    """Beside the store's file where the world has one, else in the store itself."""
    if STORE in os.environ:
        return FileBoard(Path(os.environ[STORE]).parent)
    return dist.PrefixStore("megafork/whereabouts", dist.distributed_c10d._get_default_store())


class Whereabouts:
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
        """What a collective's time-out inside it means is told once, with the ranks it waited for.

        Raises PeerError then, on all ranks that waited, and where another rank's end broke a
        connection: that rank, or what started it, tells.
        """
        try:
            yield
        except RuntimeError as error:
            timed_out = _TIMED_OUT.search(str(error))
            if self.world_size == 1 or not (timed_out or _BROKEN.search(str(error))):
                raise
            self._tell(error, timed_out=timed_out is not None)
            raise PeerError("a collective failed") from error

    def _tell(self, error: RuntimeError, *, timed_out: bool) -> None:
        now = time.time()
        self._board.set(f"waits/{self.rank}", "timed out" if timed_out else "broken")
        time.sleep(_GRACE_S)
        waits = {r: f"waits/{r}" for r in range(self.world_size)}
        waiting = {r: self._board.get(k) for r, k in waits.items() if self._board.check([k])}
        if not timed_out or self._board.add("told", 1) > 1:  # of several that did, one tells
            return
        absent = [self._last_seen(r, now) for r in waits if r not in waiting]
        message = (
            f"in {self._where} a collective was not done within "
            f"parallel.timeout_minutes={self.timeout_minutes:g}. "
            + ("; ".join(absent) or "Every rank waits for another: is the network whole?")
        )
        last_words.leave(message)
        print(
            f"error (rank {self.rank}): {message}\n"
            f"  Look at these processes (py-spy dump --pid), or allow more time. {error}",
            file=sys.stderr,
            flush=True,
        )

    def _last_seen(self, rank: int, now: float) -> str:
        since, where = self._board.get(f"at/{rank}").decode().split(" ", 1)
        return f"Rank {rank} did not come; it has been in {where} for {now - float(since):.0f} s"

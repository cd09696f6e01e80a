"""Who is where: when a collective fails, the ranks that did not come to it are named."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megafork.errors import PeerError, UserError

_FAILED = re.compile("timed? ?out|closed by peer|connection reset|communicator was aborted", re.I)
_GRACE_S = 3.0
"""One rank's failure closes its connections, so the others that wait fail within moments."""


class Whereabouts:
    """A board in the store of the world, which needs no collective to be written or read.

    gloo's failures are caught here; NCCL's watchdog ends the process by itself, with its own words.
    """

    def __init__(self, rank: int, world_size: int, timeout_minutes: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_minutes = timeout_minutes
        self._store = dist.PrefixStore(
            "megafork/whereabouts",
            dist.distributed_c10d._get_default_store(),
        )
        self.enter("start")

    def enter(self, where: str) -> None:
        """Write down what this rank does from now on."""
        self._where = where
        self._store.set(f"at/{self.rank}", f"{time.time()} {where}")

    @contextmanager
    def told(self) -> Iterator[None]:
        """A collective that failed inside becomes a UserError naming the ranks it waited for.

        One rank tells; the others that waited raise a PeerError.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _FAILED.search(str(error)):
                raise
            raise self._verdict(error) from error

    def _verdict(self, error: RuntimeError) -> UserError:
        now = time.time()
        self._store.set(f"waits/{self.rank}", "")
        time.sleep(_GRACE_S)
        waiting = [r for r in range(self.world_size) if self._store.check([f"waits/{r}"])]
        if waiting[0] != self.rank or self._store.check(["told"]):
            return PeerError("another rank tells")
        self._store.set("told", "")
        missing = [self._last_seen(r, now) for r in range(self.world_size) if r not in waiting]
        return UserError(
            f"in {self._where} a collective failed that ends after parallel.timeout_minutes="
            f"{self.timeout_minutes:g}. "
            + ("; ".join(missing) or "Every rank waits for another: is the network whole?")
            + f"\n  Look at these processes (py-spy dump --pid), or allow more time. {error}"
        )

    def _last_seen(self, rank: int, now: float) -> str:
        since, where = self._store.get(f"at/{rank}").decode().split(" ", 1)
        return f"Rank {rank} did not come; it has been in {where} for {now - float(since):.0f} s"

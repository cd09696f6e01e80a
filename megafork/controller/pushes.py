"""Weight pushes, at the controller's end: it talks to the servers while the ranks send.

    begins    which servers take part; whether the ranks have to make their senders anew
    joined    the servers' workers have joined the senders
    ended     every rank has sent its part, or could not: one verdict for all

Imports no torch.
"""

from __future__ import annotations

import asyncio
from typing import Any

from megafork.errors import UserError
from megafork.rollout.fleet import Fleet
from megafork.rollout.messages import Header


class PushFailed(UserError):
    """Servers did not take the weights."""

    @classmethod
    def of(cls, cause: UserError) -> PushFailed:
        return cls(f"the weight transfer to the rollout server failed: {cause}")


class Pushes:
    """Conducts pushes, one after the other, which all ranks take part in.

    workers_of_each: vLLM workers of one server. in_flight: responses that are being generated go
    on with the new weights; False: a push waits for them. colocated: the servers sleep around a
    push. timeout_s: for workers and senders to wait for each other.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        workers_of_each: int,
        timeout_s: float,
        in_flight: bool,
        colocated: bool,
    ) -> None:
        self.fleet = fleet
        self.workers_of_each, self.timeout_s = workers_of_each, timeout_s
        self.in_flight, self.colocated = in_flight, colocated
        self._members: list[tuple[str, int]] = []
        """Servers of the transfer groups; none after a failure"""
        self._wanted: list[tuple[str, int]] = []
        self._addresses: list[dict[str, Any]] = []
        self._buckets: list[dict[str, Any]] = []
        self._update: asyncio.Task[None] | None = None

    async def begins(self) -> Header:
        """Return {"kind": "send"}, or {"kind": "join", "num_workers"} for new senders first."""
        if self.colocated:
            await self.fleet.wake_up("weights")
        self._wanted = await self.fleet.members()
        if self._wanted == self._members:
            await self._prepare()
            return {"kind": "send"}
        self._members = []
        return {"kind": "join", "num_workers": self.workers_of_each * len(self._wanted)}

    async def joined(self, offers: list[Header | None]) -> Header:
        """Have the workers join. offers: each rank's sender, by address and buckets, or None.

        The offers are in the order of the ranks, and so of the pipeline's stages.
        """
        found = [offer for offer in offers if offer is not None]
        self._addresses = [offer["address"] for offer in found]
        self._buckets = [bucket for offer in found for bucket in offer["buckets"]]
        num_workers = self.workers_of_each * len(self._wanted)
        await self.fleet.init_transfer(self._addresses, num_workers, self.timeout_s)
        await self._prepare()
        return {"kind": "send"}

    async def _prepare(self) -> None:
        """Pause the sampling, and have the servers wait for the senders."""
        if not self.colocated:
            await self.fleet.pause("keep" if self.in_flight else "wait")
        await self.fleet.start_weight_update()
        self._members = []  # after a failure the groups have to be built again
        self._update = asyncio.create_task(self.fleet.update_weights(self._buckets))
        self._update.add_done_callback(_look_at)  # a rank may be lost before `ended`

    async def ended(self, version: int, failures: list[str | None]) -> None:
        """Give the weights their version, and go on. failures: each rank's, None for none.

        Nothing cached survives. A response that goes on is sampled as if all its tokens so far had
        been the prompt: their keys and values are computed again. Raises PushFailed.
        """
        update, self._update = self._update, None
        assert update is not None
        try:
            await update  # the servers know why a connection broke
            for rank, failure in enumerate(failures):
                if failure is not None:
                    raise UserError(f"rank {rank}: {failure}")
            await self._finish(version)
        except UserError as error:
            raise PushFailed.of(error) from error
        self._members = self._wanted

    async def _finish(self, version: int) -> None:
        await self.fleet.finish_weight_update(version)
        if not self.colocated:  # what sleeps has no cache, and wakes up by another word
            await self.fleet.reset_prefix_cache(True)
        reached = await self.fleet.weight_version()
        if reached != version:
            raise UserError(
                f"the rollout server says weight version {reached} after a push of {version}: "
                "does another trainer use the same server?"
            )
        if self.colocated:
            await self.fleet.wake_up("kv_cache")
        else:
            await self.fleet.resume()


def _look_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # or asyncio complains that nobody has

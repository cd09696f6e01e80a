"""Many rollout servers that look like one.

A server that is lost (it does not answer, was started again, is much too slow) gets nothing more,
and what it had goes to the others. When it answers again it joins at the next weight push, and so
never samples with weights that it had before. Its process is started again by others: by
`LocalServers` on its node, or by whoever ran `megafork serve`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal, Self, TypeVar

from megafork.errors import UserError
from megafork.rollout.client import RolloutClient, ServerError, ServerLost
from megafork.rollout.routing import Router, Server

R = TypeVar("R")
_WATCH_S = 5.0
_AGAIN_S = 1.0
"""Until the next look at a server that does not answer"""
_CHECKS = 3
"""In a row without an answer; then a server is lost."""


async def _nobody_given_up() -> dict[str, str]:
    return {}


class Fleet(Router):
    """A `RolloutClient` of many servers, for one event loop. Only one task may administer them at a
    time; what changes servers reaches those that the last `members` named. `wait_until_up` begins
    to watch the servers, and the end of the fleet's `async with` ends that.

    max_restarts: pushes in a row that may fail for a server; then it is left out for good.
    given_up: the cause, by its URL, of each server that nobody starts again. colocated: servers and
    trainer take turns on the same devices. Then only `look_again` finds a lost server back.
    """

    def __init__(
        self,
        clients: Sequence[RolloutClient],
        *,
        max_num_seqs: int,
        max_restarts: int = 0,
        given_up: Callable[[], Awaitable[dict[str, str]]] = _nobody_given_up,
        colocated: bool = False,
    ) -> None:
        super().__init__(clients, max_num_seqs)
        self._max_restarts, self._given_up = max_restarts, given_up
        self._watched = ("live",) if colocated else ("live", "away")
        self._members: list[tuple[Server, int]] = []
        """Members of the last push, with their num_losses then"""
        self._version: int | None = None
        self._num_replaced = 0
        self._watching: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """The version of the weights that this run gave to the servers; 0 before the first."""
        return self._version or 0

    def counts(self) -> dict[str, float]:
        """Return how many servers get requests, and how many were lost or joined again.

        The latter two are counted since the last call. For metrics.jsonl.
        """
        found: dict[str, float] = {
            "rollout/servers": self.num_live,
            "rollout/servers_lost": self._num_lost,
            "rollout/servers_replaced": self._num_replaced,
        }
        self._num_lost = self._num_replaced = 0
        return found

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})

    async def wait_until_up(
        self, timeout_s: float, key: str, check: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until all servers answer, tell which are missing, and watch them from then on.

        key: the setting that names the key. check: called every second; what it raises ends the
        waiting. Raises UserError after timeout_s, and at once where a server refuses the key.
        """
        deadline, told = time.monotonic() + timeout_s, ""
        while True:
            await _each(lambda server: self._look_for(server, key), self._in_state("away"))
            missing = ", ".join(server.client.url for server in self._in_state("away"))
            if not missing:
                break
            if time.monotonic() > deadline:
                raise UserError(
                    f"no rollout server answers at rollout.url={missing} within "
                    f"rollout.startup_timeout_s={timeout_s:g}: start one with `megafork serve`, "
                    "allow more time, or unset rollout.url"
                )
            if missing != told:
                self.note(
                    f"waiting for the rollout server at {missing} "
                    f"(rollout.startup_timeout_s={timeout_s:g})"
                )
                told = missing
            check()
            await asyncio.sleep(_AGAIN_S)
        for server in self._servers:
            self._open(server)
        self._watching = asyncio.create_task(self._watch())

    async def _look_for(self, server: Server, key: str) -> None:
        try:
            await server.client.weight_version()
        except ServerError as error:
            if error.status not in (401, 403):
                return
            raise UserError(
                f"no rollout server answers at rollout.url={server.client.url} with the key of "
                f"{key}: {error}"
            ) from error
        except ServerLost:
            return
        server.state = "back"

    async def wait_for_one(self, timeout_s: float) -> None:
        """Wait, when all were lost, until one answers again. Raises UserError when none does."""
        deadline = time.monotonic() + timeout_s
        while True:
            lost = await self._given_up()
            if self._in_state("live", "back"):  # or it was found back during that question
                return
            awaited = [s for s in self._in_state("away") if s.client.url not in lost]
            if time.monotonic() > deadline or not awaited:
                causes = list(lost.values()) or [server.cause for server in self._servers]
                raise UserError(
                    "no rollout server came back (rollout.startup_timeout_s="
                    f"{timeout_s:g}, rollout.max_restarts={self._max_restarts}): {causes[0]}"
                )
            await asyncio.sleep(_AGAIN_S)

    async def members(self) -> list[tuple[str, int]]:
        """Return the servers that the next push is for: those that live, and those that are back.

        Their workers form the transfer groups, in this order; the number tells a server from the
        one that it was before. Raises ServerLost when there is none.
        """
        await _each(self._mark_down_unless_well, self._in_state("live", "back"))
        self._members = [(s, s.num_losses) for s in self._in_state("live", "back")]
        if not self._members:
            raise self._nobody()
        return [(server.client.url, losses) for server, losses in self._members]

    async def mark_lost(self) -> int:
        """Mark those members of a failed push down that are lost. Returns how many are."""
        await _each(self._mark_down_unless_well, [server for server, _ in self._members])
        lost = [server for server, losses in self._members if server.num_losses != losses]
        for server in lost:
            server.num_failed_pushes += 1
            if server.num_failed_pushes > max(1, self._max_restarts):
                server.state = "gone"
                self.note(f"warning: {server.client.url} took no weights and is asked no more")
        return len(lost)

    def silent(self) -> list[str]:
        """Return the URLs of servers that are lost and do not answer."""
        return [server.client.url for server in self._in_state("away")]

    async def health(self) -> bool:
        """Return whether a server lives. Those that did and do not are marked down."""
        await _each(self._mark_down_unless_well, self._in_state("live"))
        return self.num_live > 0

    async def _mark_down_unless_well(self, server: Server) -> None:
        losses = server.num_losses
        for _ in range(_CHECKS):
            cause = await server.client.why_unhealthy()
            if cause is None:
                return
            await asyncio.sleep(_AGAIN_S)
        assert cause is not None
        self._mark_down(server, cause, losses)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S if self.num_live else _AGAIN_S)
            try:
                await _each(self._look_at, self._in_state(*self._watched))
            except Exception as error:  # nobody awaits this; the next look may go well
                self.note(f"warning: the rollout servers could not be watched: {error!r}")

    async def look_again(self) -> None:
        """Look at those that were lost."""
        await _each(self._look_at, self._in_state("away"))

    async def _look_at(self, server: Server) -> None:
        losses = server.num_losses
        if server.state == "live":
            server.num_silent = 0 if await server.client.is_alive() else server.num_silent + 1
            if server.num_silent >= _CHECKS:
                self._mark_down(server, f"{server.client.url}/health does not answer", losses)
            return
        try:
            await server.client.weight_version()  # which asks the engine, not its front alone
        except UserError:
            return
        if server.state == "away" and server.num_losses == losses:
            server.state = "back"
            if self._version is None:  # its own weights are right
                self._join(server)

    def _join(self, server: Server) -> None:
        self._open(server)
        if server.num_losses:
            self._num_replaced += 1
            self.note(f"the rollout server at {server.client.url} is back")

    # -------------------------------------------------------------- administration

    async def sleep(self) -> list[str]:
        """Have all that live or are back give up weights and cache.

        Returns the URLs of all others, whatever they hold: those that were lost, now or before.
        Raises ServerError of one that is well and says no.
        """
        asleep: list[Server] = []

        async def put(server: Server) -> None:
            losses = server.num_losses
            try:
                await server.client.sleep()
                asleep.append(server)
            except ServerLost as error:
                self._mark_down(server, str(error), losses)
            except ServerError:
                await self._mark_down_unless_well(server)
                if server.num_losses == losses:
                    raise

        await _each(put, self._in_state("live", "back"))
        return [server.client.url for server in self._servers if server not in asleep]

    async def wake_up(self, part: Literal["weights", "kv_cache"]) -> None:
        """Wake the servers of the next push for their weights, and for their cache after it."""
        if part == "weights":
            await self.members()
        await self._all(lambda client: client.wake_up(part))
        if part == "kv_cache":
            self._join_members()

    async def pause(self, mode: str = "wait") -> None:
        await self._all(lambda client: client.pause(mode))

    async def resume(self) -> None:
        """Go on. Servers that were back, and have the others' weights now, join them."""
        await self._all(lambda client: client.resume())
        self._join_members()

    def _join_members(self) -> None:
        for server, losses in self._members:
            if server.state == "back" and server.num_losses == losses:
                self._join(server)

    async def reset_prefix_cache(self, running: bool = False) -> None:
        await self._all(lambda client: client.reset_prefix_cache(running))

    async def init_transfer(
        self, senders: list[dict[str, Any]], num_workers: int, timeout_s: float = 300.0
    ) -> None:
        """Connect the workers of all members to each sender, one group for each."""
        each = num_workers // len(self._members)
        first = {server.client: i * each for i, (server, _) in enumerate(self._members)}
        await self._all(
            lambda client: client.init_transfer(
                senders, num_workers, timeout_s, first_worker=first[client]
            )
        )

    async def start_weight_update(self) -> None:
        await self._all(lambda client: client.start_weight_update())

    async def update_weights(self, buckets: list[dict[str, Any]]) -> None:
        await self._all(lambda client: client.update_weights(buckets))

    async def finish_weight_update(self, weight_version: int) -> None:
        await self._all(lambda client: client.finish_weight_update(weight_version))
        self._version = weight_version

    async def weight_version(self) -> int:
        """Return the members' version. Raises UserError where they have different ones."""
        versions = await self._all(lambda client: client.weight_version())
        if len(set(versions)) > 1:
            raise UserError(f"the rollout servers have different weights: versions {versions}")
        return versions[0]

    async def _all(self, call: Callable[[RolloutClient], Awaitable[R]]) -> list[R]:
        return await _each(lambda server: call(server.client), [s for s, _ in self._members])


async def _each(call: Callable[[Server], Awaitable[R]], servers: Iterable[Server]) -> list[R]:
    """Call for all servers at the same time. Raises the first failure when all have ended."""
    ended = await asyncio.gather(*map(call, servers), return_exceptions=True)
    found = []
    for result in ended:
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found

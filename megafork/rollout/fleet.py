"""Many rollout servers that look like one.

A server that is lost (it does not answer, was started again, is much too slow) gets nothing more,
and what it had goes to the others. When it answers again it joins at the next weight push, and so
never samples with weights that it had before. To start its process again is another's work: that
of `LocalServers` on its node, or of whoever ran `megafork serve`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
_AT_ONCE = 64
"""Servers that are talked to at the same time"""


class Fleet(Router):
    """`RolloutClient` of many servers. Administration is one thread's at a time; what changes
    servers reaches those that the last `members` named. Enter it before use.

    max_restarts: pushes in a row that may fail for a server; then it is left out for good.
    given_up: the cause, by its URL, of each server that nobody starts again. in_turns: with the
    trainer, on the same devices. Then a server that was lost is back when `look_again` finds it.
    """

    def __init__(
        self,
        clients: Sequence[RolloutClient],
        *,
        max_num_seqs: int,
        max_restarts: int = 0,
        given_up: Callable[[], dict[str, str]] = dict,
        in_turns: bool = False,
    ) -> None:
        super().__init__(clients, max_num_seqs)
        self._max_restarts, self._given_up = max_restarts, given_up
        self._watched = ("live",) if in_turns else ("live", "away")
        self._members: list[tuple[Server, int]] = []
        """Of the last push, with their num_drains then"""
        self._version: int | None = None
        self._num_replaced = 0
        self._closed = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="rollout servers", daemon=True)

    @property
    def version(self) -> int:
        """Of the weights that this run gave to the servers; 0 before the first."""
        return self._version or 0

    def counts(self) -> dict[str, float]:
        """Servers that get requests, and how many were lost and joined again since the last call.

        For metrics.jsonl.
        """
        with self._lock:
            found: dict[str, float] = {
                "rollout/servers": self.num_live,
                "rollout/servers_lost": self._num_lost,
                "rollout/servers_replaced": self._num_replaced,
            }
            self._num_lost = self._num_replaced = 0
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closed.set()
        if self._watching.is_alive():
            self._watching.join(1.0)  # not for the answer of a server that hangs

    def wait_until_up(
        self, timeout_s: float, key: str, check: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until all servers answer, and tell which are missing.

        key: the setting that names the key. check: called every second; what it raises ends the
        waiting. Raises UserError after timeout_s, and at once where a server refuses the key.
        """
        deadline, told = time.monotonic() + timeout_s, ""
        while True:
            self._each(lambda server: self._look_for(server, key), self._in_state("away"))
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
            time.sleep(_AGAIN_S)
        with self._lock:
            for server in self._servers:
                self._open(server)
        self._watching.start()

    def _look_for(self, server: Server, key: str) -> None:
        try:
            server.client.weight_version()
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

    def wait_for_one(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        """When all were lost: until one answers again. Raises UserError when none does."""
        deadline = time.monotonic() + timeout_s
        while not self._in_state("live", "back"):
            check()
            lost = self._given_up()
            awaited = [s for s in self._in_state("away") if s.client.url not in lost]
            if time.monotonic() > deadline or not awaited:
                causes = list(lost.values()) or [server.cause for server in self._servers]
                raise UserError(
                    "no rollout server came back (rollout.startup_timeout_s="
                    f"{timeout_s:g}, rollout.max_restarts={self._max_restarts}): {causes[0]}"
                )
            time.sleep(_AGAIN_S)

    def members(self) -> list[tuple[str, int]]:
        """The servers that the next push is for: those that live, and those that are back.

        Their workers form the transfer groups, in this order; the number tells a server from the
        one that it was before. Raises ServerLost when there is none.
        """
        self._each(self._drain_unless_well, self._in_state("live", "back"))
        with self._lock:
            self._members = [(s, s.num_drains) for s in self._in_state("live", "back")]
            if not self._members:
                raise self._nobody()
            return [(server.client.url, drains) for server, drains in self._members]

    def drop_lost(self) -> int:
        """After a push that failed: how many of its members are lost, which are now drained."""
        self._each(self._drain_unless_well, [server for server, _ in self._members])
        lost = [server for server, drains in self._members if server.num_drains != drains]
        for server in lost:
            server.num_failed_pushes += 1
            if server.num_failed_pushes > max(1, self._max_restarts):
                server.state = "gone"
                self.note(f"warning: {server.client.url} took no weights and is asked no more")
        return len(lost)

    def silent(self) -> list[str]:
        """URLs of servers that are lost and do not answer."""
        return [server.client.url for server in self._in_state("away")]

    def health(self) -> bool:
        """Whether there is a server that lives, and those that did and do not are drained."""
        self._each(self._drain_unless_well, self._in_state("live"))
        return self.num_live > 0

    def _drain_unless_well(self, server: Server) -> None:
        drains = server.num_drains
        for _ in range(_CHECKS):
            cause = server.client.ailment()
            if cause is None:
                return
            time.sleep(_AGAIN_S)
        assert cause is not None
        self._drain(server, cause, drains)

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_S if self.num_live else _AGAIN_S):
            self._each(self._look_at, self._in_state(*self._watched))

    def look_again(self) -> None:
        """At those that were lost."""
        self._each(self._look_at, self._in_state("away"))

    def _look_at(self, server: Server) -> None:
        drains = server.num_drains
        if server.state == "live":
            server.num_silent = 0 if server.client.is_alive() else server.num_silent + 1
            if server.num_silent >= _CHECKS:
                self._drain(server, f"{server.client.url}/health does not answer", drains)
            return
        try:
            server.client.weight_version()  # which asks the engine, not its front alone
        except UserError:
            return
        with self._lock:
            if server.state == "away" and server.num_drains == drains:
                server.state = "back"
                if self._version is None:  # its own weights are right
                    self._join(server)

    def _join(self, server: Server) -> None:
        self._open(server)
        if server.num_drains:
            self._num_replaced += 1
            self.note(f"the rollout server at {server.client.url} is back")

    # -------------------------------------------------------------- administration

    def sleep(self) -> list[str]:
        """All that live or are back give up weights and cache.

        Returns the URLs of all others, whatever they hold: those that were lost, now or before.
        Raises ServerError of one that is well and says no.
        """
        asleep: list[Server] = []

        def put(server: Server) -> None:
            drains = server.num_drains
            try:
                server.client.sleep()
                asleep.append(server)
            except ServerLost as error:
                self._drain(server, str(error), drains)
            except ServerError:
                self._drain_unless_well(server)
                if server.num_drains == drains:
                    raise

        self._each(put, self._in_state("live", "back"))
        return [server.client.url for server in self._servers if server not in asleep]

    def wake_up(self, part: Literal["weights", "kv_cache"]) -> None:
        """With the weights, those that the next push is for; with the cache they have taken it."""
        if part == "weights":
            self.members()
        self._all(lambda client: client.wake_up(part))
        if part == "kv_cache":
            self._join_members()

    def pause(self, mode: str = "wait") -> None:
        self._all(lambda client: client.pause(mode))

    def resume(self) -> None:
        """Those that had been lost, and have the weights of the others now, join them."""
        self._all(lambda client: client.resume())
        self._join_members()

    def _join_members(self) -> None:
        with self._lock:
            for server, drains in self._members:
                if server.state == "back" and server.num_drains == drains:
                    self._join(server)

    def reset_prefix_cache(self, running: bool = False) -> None:
        self._all(lambda client: client.reset_prefix_cache(running))

    def init_transfer(
        self, senders: list[dict[str, Any]], num_workers: int, timeout_s: float = 300.0
    ) -> None:
        """One group for each sender, with the workers of all members."""
        each = num_workers // len(self._members)
        first = {server.client: i * each for i, (server, _) in enumerate(self._members)}
        self._all(
            lambda client: client.init_transfer(
                senders, num_workers, timeout_s, first_worker=first[client]
            )
        )

    def start_weight_update(self) -> None:
        self._all(lambda client: client.start_weight_update())

    def update_weights(self, buckets: list[dict[str, Any]]) -> None:
        self._all(lambda client: client.update_weights(buckets))

    def finish_weight_update(self, weight_version: int) -> None:
        self._all(lambda client: client.finish_weight_update(weight_version))
        self._version = weight_version

    def weight_version(self) -> int:
        """Raises UserError where the members have different ones."""
        versions = self._all(lambda client: client.weight_version())
        if len(set(versions)) > 1:
            raise UserError(f"the rollout servers have different weights: versions {versions}")
        return versions[0]

    def _all(self, call: Callable[[RolloutClient], R]) -> list[R]:
        return self._each(lambda server: call(server.client), [s for s, _ in self._members])

    def _each(self, call: Callable[[Server], R], servers: Sequence[Server]) -> list[R]:
        """At the same time. Raises the first failure when all have ended."""
        if not servers:
            return []
        with ThreadPoolExecutor(min(len(servers), _AT_ONCE)) as pool:
            return [f.result() for f in [pool.submit(call, server) for server in servers]]

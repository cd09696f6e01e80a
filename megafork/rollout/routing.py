"""Sends each request to the server with the fewest outstanding tokens, and again to another one
when that is lost."""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megafork.data.sample import UNANSWERED, Sample
from megafork.rollout.assignment import Assignment, Request
from megafork.rollout.client import RolloutClient, ServerError, ServerLost, ServerSlow
from megafork.rollout.sampling import Sampling


@dataclass(eq=False)
class Server:
    number: int
    client: RolloutClient
    state: Literal["away", "back", "live", "gone"] = "away"
    """away: does not answer; back: answers, and waits for weights; live: gets requests; gone: is
    asked no more"""
    num_losses: int = 0
    num_silent: int = 0
    """Checks in a row without an answer"""
    num_failed_pushes: int = 0
    """In a row"""
    cause: str = ""
    """Why it was lost the last time"""
    attempts: set[asyncio.Task[list[Sample]]] = field(default_factory=set)


@dataclass(eq=False)
class _Request(Request):
    name: str = field(kw_only=True)
    decided: asyncio.Event = field(default_factory=asyncio.Event, kw_only=True)
    """It has a server, or was aborted before, or no server is left"""
    is_aborted: bool = field(default=False, kw_only=True)


class Router:
    """Generates with all servers that are `live`.

    `generate` raises ServerLost when no server is left. max_num_seqs: responses that one server
    runs at once.
    """

    def __init__(self, clients: Sequence[RolloutClient], max_num_seqs: int) -> None:
        self._servers = [Server(number, client) for number, client in enumerate(clients)]
        self._assignment = Assignment(len(clients), 2 * max_num_seqs)
        self._requests: dict[str, _Request] = {}
        self._num_lost = 0
        self.note: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)

    @property
    def url(self) -> str:
        return ", ".join(server.client.url for server in self._servers)

    @property
    def clients(self) -> list[RolloutClient]:
        return [server.client for server in self._servers]

    @property
    def num_live(self) -> int:
        return sum(server.state == "live" for server in self._servers)

    async def generate(
        self,
        prompt_ids: list[int],
        n: int,
        sampling: Sampling,
        seed: int | None = None,
        *,
        request_id: str | None = None,
    ) -> list[Sample]:
        """Generate as `RolloutClient` does, and by another server when one is lost meanwhile."""
        name = request_id or uuid.uuid4().hex
        slow: ServerSlow | None = None
        while True:
            request = _Request(len(prompt_ids) + n * sampling.max_tokens, n, name=name)
            self._enter(request)
            try:
                await request.decided.wait()
                if request.server is None:
                    if request.is_aborted:
                        return [UNANSWERED] * n
                    raise self._nobody()
                server = self._servers[request.server]
                losses = server.num_losses
                if server.state != "live":  # lost since it was chosen
                    raise ServerLost(server.cause)
                asked = server.client.generate(prompt_ids, n, sampling, seed, request_id=name)
                return await self._answer(server, request, asked)
            except ServerSlow as error:
                if slow is not None or self.num_live == 1:  # it is the request that takes long
                    raise
                slow = error
                self._mark_down(server, str(error), losses)
            except ServerLost as error:
                if request.server is None:
                    raise
                self._mark_down(server, str(error), losses)
            finally:
                self._leave(request)
            if request.is_aborted:
                return [UNANSWERED] * n

    async def _answer(
        self, server: Server, request: _Request, asked: Coroutine[Any, Any, list[Sample]]
    ) -> list[Sample]:
        """Return the server's answer. Raises ServerLost also when it is marked down meanwhile."""
        attempt = asyncio.create_task(asked)
        server.attempts.add(attempt)
        try:
            samples = await attempt
        except asyncio.CancelledError:
            this = asyncio.current_task()
            assert this is not None
            if this.cancelling():
                raise
            raise ServerLost(server.cause) from None
        except ServerError as error:
            if await server.client.health():
                raise
            raise ServerLost(str(error)) from error
        finally:
            server.attempts.discard(attempt)
        if not request.is_aborted and any(sample.aborted for sample in samples):
            raise ServerLost(
                f"the rollout server at {server.client.url} aborted responses that nobody asked it "
                "to: was it told to end, or does another client use it?"
            )
        return samples

    async def abort(self, request_ids: list[str]) -> None:
        """End requests of `generate`, on whichever server they are or before they have one."""
        found: dict[int, list[str]] = {}
        for name in request_ids:
            request = self._requests.get(name)
            if request is None:
                continue
            request.is_aborted = True
            if request.server is None:
                request.decided.set()
            else:
                found.setdefault(request.server, []).append(name)
        await asyncio.gather(*(self._abort(self._servers[i], found[i]) for i in found))

    async def _abort(self, server: Server, names: list[str]) -> None:
        losses = server.num_losses
        try:
            await server.client.abort(names)
        except ServerLost as error:
            self._mark_down(server, str(error), losses)

    def _enter(self, request: _Request) -> None:
        self._requests[request.name] = request
        self._tell(self._assignment.enter(request))
        if not self.num_live:
            request.decided.set()

    def _leave(self, request: _Request) -> None:
        if self._requests.get(request.name) is request:
            del self._requests[request.name]
        self._tell(self._assignment.leave(request))

    def _tell(self, requests: Iterable[Request]) -> None:
        for request in requests:
            assert isinstance(request, _Request)
            request.decided.set()

    def _nobody(self) -> ServerLost:
        causes = [server.cause for server in self._servers]
        several = "no rollout server is left. " if len(causes) > 1 else ""
        return ServerLost(several + "; ".join(dict.fromkeys(causes)))

    def _mark_down(self, server: Server, cause: str, num_losses: int) -> None:
        """Count a server as lost, and give what it had to the others.

        num_losses: the server's when it failed; if it has been marked down since, nothing happens.
        """
        if server.state not in ("live", "back") or server.num_losses != num_losses:
            return
        was_live = server.state == "live"
        server.state, server.cause, server.num_silent = "away", cause, 0
        server.num_losses += 1
        server.client.forget_version()
        self._assignment.close(server.number)
        for attempt in server.attempts:
            attempt.cancel()
        if not self.num_live:
            self._tell(r for r in self._requests.values() if r.server is None)
        if was_live:
            self._num_lost += 1
            if self.num_live:
                self.note(
                    f"warning: the rollout server at {server.client.url} is lost, and "
                    f"{self.num_live} others go on. {cause}"
                )

    def _open(self, server: Server) -> None:
        server.state = "live"
        server.num_silent = server.num_failed_pushes = 0
        self._tell(self._assignment.open(server.number))

    def _in_state(self, *states: str) -> list[Server]:
        return [server for server in self._servers if server.state in states]

"""The first machine's launcher decides for all: when to start, when it is over, and why."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from dataclasses import dataclass
from typing import Any

from megafork.cluster.node_messages import BEAT_S, LOST, MAX_LINE, Failure, Plan, pack, receive
from megafork.errors import USER_ERROR
from megafork.parallel.addresses import LOOPBACK
from megafork.parallel.ports import free_port
from megafork.system.signals import INTERRUPTED

_SETTLE_S = 2.0
"""After a failure with a cause of its own; what else it brings down may be told with it."""
_FOLLOWERS_S = 45.0
"""After one without: the agent beside the cause reports when its other ranks have ended."""
_FAREWELL_S = 20.0
_TOGETHER_S = 5.0
"""Machines that fall silent within so many seconds are lost together."""


@dataclass(frozen=True)
class End:
    status: int
    cause: str = ""


@dataclass
class Peer:
    """A machine's launcher, as the coordinator sees it."""

    writer: asyncio.StreamWriter
    heard: float
    gone: bool = False
    ended: bool = False
    """Its processes have ended"""


class Coordinator:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.peers: dict[str, Peer] = {}
        self.failures: list[Failure] = []
        """In the order in which they were heard of"""
        self._listeners: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._first_failure = 0.0
        self._stopping = False
        self._stop_file = plan.logs / "stop"

    async def run(self) -> End:
        """Lead the run, from the first launcher that comes to the last one that leaves."""
        try:
            server = await asyncio.start_server(self._listen, port=self.plan.port, limit=MAX_LINE)
        except OSError as error:
            return End(
                USER_ERROR, f"{self.plan.first_node}: port {self.plan.port} (--port): {error}"
            )
        watching = asyncio.create_task(self._watch_stop_file())
        async with server:
            end = await self._all_come()
            if end is None:
                self._tell(go=self._endpoint())
                while (end := self._verdict()) is None:
                    await self._beat()
            self._tell(end=end.status)
            watching.cancel()
            await self._part()
        return end

    def _endpoint(self) -> str:
        """Return host:port for the ranks' store, at the address by which others reached us."""
        others = [self.peers[name] for name in self.plan.training[1:]]
        hosts = [peer.writer.get_extra_info("sockname")[0] for peer in others] or [LOOPBACK]
        return f"{hosts[0]}:{free_port(hosts[0])}"

    async def _part(self) -> None:
        """Wait until the launchers that are still heard of have ended their processes and gone."""
        now = time.monotonic()
        here = [peer for peer in self.peers.values() if now - peer.heard < _TOGETHER_S]
        while time.monotonic() < now + _FAREWELL_S and not all(peer.gone for peer in here):
            await asyncio.sleep(0.1)
        for writer in self._listeners.values():
            writer.transport.abort()  # what waits to be sent to lost ones, too
        await asyncio.gather(*self._listeners, return_exceptions=True)  # strangers may come, too

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        listener = asyncio.current_task()
        assert listener is not None
        self._listeners[listener] = writer
        hello = await receive(reader) or {}
        name, proof = str(hello.get("hello")), str(hello.get("proof"))
        known = name in self.plan.nodes and hmac.compare_digest(
            proof.encode(), self.plan.proof(name).encode()
        )
        if known and name not in self.peers:
            peer = self.peers[name] = Peer(writer, time.monotonic())
            while (message := await receive(reader)) is not None:
                self._heard(peer, message)
            peer.gone = True
        writer.close()

    def _heard(self, peer: Peer, message: dict[str, Any]) -> None:
        peer.heard = time.monotonic()
        if "stop" in message:
            self._stop()
        if "ended" in message:
            peer.ended = True
            if message["ended"] is not None:
                self.failures.append(Failure(**message["ended"]))
                self._first_failure = self._first_failure or peer.heard

    async def _all_come(self) -> End | None:
        deadline = time.monotonic() + self.plan.startup_s
        while absent := [name for name in self.plan.nodes if name not in self.peers]:
            if time.monotonic() > deadline:
                return End(
                    LOST,
                    f"{', '.join(absent)} did not come within {self.plan.startup_s:g} s: no "
                    "launcher runs there, or it cannot reach "
                    f"{self.plan.first_node}:{self.plan.port}",
                )
            await self._beat()
        return None

    async def _beat(self) -> None:
        self._tell(beat=1, **({"stop": 1} if self._stopping else {}))
        await asyncio.sleep(BEAT_S / 4)

    async def _watch_stop_file(self) -> None:
        # In a thread: a file system that does not answer is no reason to fall silent. Of one that
        # answers with an error (ESTALE) os.path.exists says False, and pathlib's raises.
        while not await asyncio.to_thread(os.path.exists, self._stop_file):
            await asyncio.sleep(0.5)
        self._stop()

    def _stop(self) -> None:
        """Ask all launchers to stop, again with every beat: some may come after it."""
        self._stopping = True
        self._tell(stop=1)

    def _tell(self, **message: Any) -> None:
        for peer in self.peers.values():
            if not peer.gone and not peer.writer.is_closing():
                peer.writer.write(pack(**message))

    def _verdict(self) -> End | None:
        """Return the run's end, or None while it goes on."""
        now = time.monotonic()
        training = [self.peers[name] for name in self.plan.training]
        all_ended = all(peer.ended for peer in training)
        if all_ended and not any(f.node in self.plan.training for f in self.failures):
            return End(0)
        if lost := self._lost(now):
            return End(LOST, lost)
        if not self.failures:
            return None
        waited = now - self._first_failure
        causes = [f for f in self.failures if f.words is not None and f.own]
        if not causes and any(f.status == INTERRUPTED for f in self.failures):
            return End(INTERRUPTED) if all_ended or waited > _FOLLOWERS_S else None
        if waited < (_SETTLE_S if causes else _FOLLOWERS_S):
            return None
        told = [f for f in self.failures if f.words is not None]
        first = (causes or told or self.failures)[0]
        status = first.status if first.status > 0 else 1
        more = f" (see {first.log})" if first.log is not None else ""
        return End(status, f"{first.told()}{self._quiet(now)}{more}")

    def _lost(self, now: float) -> str | None:
        gone = [name for name, peer in self.peers.items() if peer.gone]
        if gone:
            return f"the launcher of {', '.join(gone)} ended without a word: was it killed?"
        limit = self.plan.lost_after_s
        if all(now - peer.heard <= limit for peer in self.peers.values()):
            return None
        silent = [n for n, p in self.peers.items() if now - p.heard > limit - _TOGETHER_S]
        alone = (
            " (all but this machine: its own link?)" if len(silent) == len(self.peers) - 1 else ""
        )
        return (
            f"nothing was heard of {', '.join(silent)} for {limit:g} s{alone}: switched off, "
            "hung, or cut off from the network"
        )

    def _quiet(self, now: float) -> str:
        quiet = [
            f"; {name} has not been heard of for {now - peer.heard:.0f} s"
            for name, peer in self.peers.items()
            if now - peer.heard > 5 * BEAT_S
        ]
        return "".join(quiet)

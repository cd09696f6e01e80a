"""The agents of all nodes (controller/agent.py), at the controller's end: servers and verifiers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megafork.errors import UserError
from megafork.rollout.messages import Header, Link
from megafork.verifiers.verifier import Judge, Verdict


class NodeLost(Exception):
    """The agent of a node has ended, hangs or cannot be reached."""


class AgentLink:
    """The connection to one node's agent, whose answers come in any order."""

    def __init__(self, link: Link, said: Header) -> None:
        """said: the agent's first message."""
        self.node, self.host = int(said["node"]), str(said["host"])
        self.servers = [(str(url), Path(log)) for url, log in said.get("servers", [])]
        self.workers = int(said.get("workers", 0))
        """Responses that its verifiers judge at once"""
        self.failure = said.get("failure")
        """Why it could not start its servers"""
        self._link = link
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Header]] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self.lost: str | None = None

    @property
    def where(self) -> str:
        """The beginning of a message about it."""
        return "" if self.node == 0 else f"node {self.node} ({self.host}): "

    async def ask(self, question: Header) -> Header:
        """Return the agent's answer. Raises NodeLost; cancelled, has the agent give up too."""
        if self.lost is not None:
            raise NodeLost(self.lost)
        number = next(self._numbers)
        answered: asyncio.Future[Header] = asyncio.get_running_loop().create_future()
        self._asked[number] = answered
        try:
            try:
                await self._link.send(question | {"number": number})
            except OSError as error:
                raise NodeLost(f"connection lost: {error}") from error
            return await answered
        except asyncio.CancelledError:
            task = asyncio.create_task(self._forget(number))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
            raise
        finally:
            del self._asked[number]
            if not answered.cancel() and not answered.cancelled():
                answered.exception()  # or asyncio complains that nobody has looked

    async def _forget(self, number: int) -> None:
        with contextlib.suppress(OSError):
            await self._link.send({"kind": "forget", "number": number})

    async def hear(self) -> str:
        """Take the agent's answers until the connection ends. Returns why it ended."""
        alive = asyncio.create_task(self._link.say_alive())
        try:
            while True:
                header, _ = await self._link.receive()
                answered = self._asked.get(header["number"])
                if answered is not None and not answered.done():
                    answered.set_result(header)
        except EOFError:
            self.lost = "its connection ended"
        except Exception as error:  # a broken connection, or an answer that is none
            self.lost = f"connection lost: {error!r}"
        finally:
            alive.cancel()
        for answered in self._asked.values():
            if not answered.done():
                answered.set_exception(NodeLost(self.lost))
        return self.lost


class RemoteVerifiers:
    """The verifiers of another node."""

    def __init__(self, agent: AgentLink, judge: Judge) -> None:
        """judge: this node's, which counts and tells the failures of all."""
        self.node, self.workers = agent.host, agent.workers
        self._agent, self._judge = agent, judge

    async def __call__(
        self, prompt: str, response: str, answer: str, columns: Mapping[str, Any]
    ) -> Verdict:
        question: Header = {"kind": "judge"}
        question |= {"prompt": prompt, "response": response, "answer": answer}
        if columns:
            question["columns"] = dict(columns)
        found = await self._agent.ask(question)
        for kind, cause in found["causes"].items():
            self._judge.causes.setdefault(kind, f"{cause} (on {self.node})")
        if found["told"]:
            self._judge.tell(found["told"])
        if "user_error" in found:
            raise UserError(f"{found['user_error']} (on {self.node})")
        if "error" in found:
            raise RuntimeError(f"the verifiers on {self.node} broke: {found['error']}")
        return Verdict(found["reward"], found["accuracy"], found["failure"])


class UsesVerifiers(Protocol):
    """Something that judges by the verifiers of all nodes (judging.py)."""

    judge: Judge

    def add(self, verifiers: RemoteVerifiers, /) -> None: ...
    def drop(self, verifiers: RemoteVerifiers, /) -> None: ...


class Agents:
    """The agents of all nodes, each of which joins by a connection of its own.

    num_nodes: how many are awaited. note: tells a person of one that is lost. silence_s: for how
    long one may say nothing.
    """

    def __init__(self, num_nodes: int, note: Callable[[str], None], silence_s: float) -> None:
        self._num_nodes, self._note, self._silence_s = num_nodes, note, silence_s
        self._agents: dict[int, AgentLink] = {}
        self._are_here = asyncio.Event()

    async def talk(self, link: Link, judging: Awaitable[UsesVerifiers]) -> None:
        """Talk with an agent until its connection ends. judging: gets the agent's verifiers."""
        link.silence_s = self._silence_s
        said, _ = await link.receive()
        agent = AgentLink(link, said)
        self._add(agent)
        hearing = asyncio.create_task(agent.hear())
        if agent.workers:
            users = await judging
            verifiers = RemoteVerifiers(agent, users.judge)
            users.add(verifiers)
            why = await hearing
            users.drop(verifiers)
            self._note(f"warning: the verifiers on {agent.host} are lost, and others go on. {why}")
        why = await hearing
        if agent.servers:
            self._note(
                f"warning: the agent of node {agent.node} ({agent.host}) is lost, and its servers "
                f"with it. {why}"
            )

    def _add(self, agent: AgentLink) -> None:
        self._agents[agent.node] = agent
        if len(self._agents) == self._num_nodes:
            self._are_here.set()

    async def all_here(self, timeout_s: float) -> list[AgentLink]:
        """Wait for every node's agent. Raises UserError that names who does not come, or failed."""
        try:
            await asyncio.wait_for(self._are_here.wait(), timeout_s)
        except TimeoutError:
            absent = sorted(set(range(self._num_nodes)) - self._agents.keys())
            raise UserError(
                f"node {', '.join(map(str, absent))} has not joined within {timeout_s:g} s "
                "(parallel.startup_timeout_s): its first rank starts a process there that needs a "
                "way to the port that the first node opens"
            ) from None
        found = [self._agents[node] for node in range(self._num_nodes)]
        for agent in found:
            if agent.failure is not None:
                raise UserError(f"{agent.where}{agent.failure}")
        return found

    def require_all(self) -> None:
        """Raise UserError if an agent is lost; before all servers are up, that ends the run."""
        for agent in self._agents.values():
            if agent.lost is not None:
                raise UserError(f"{agent.where}its agent is lost: {agent.lost}")

    async def given_up(self) -> dict[str, str]:
        """Return why servers are not started again, by their URLs."""
        found = {
            url: f"{agent.where}the agent that started it is lost: {agent.lost}"
            for agent in self._agents.values()
            for url, _ in agent.servers
            if agent.lost is not None
        }
        for told in await self.servers("given_up"):
            found |= told
        return found

    async def servers(self, call: str, urls: Sequence[str] = ()) -> list[Any]:
        """Have each node's agent call a method of its servers. Returns what each said.

        call: the method's name in LocalServers. Raises the UserError of the first that failed. A
        node that is lost has no servers any more, and is left out.
        """
        question = {"kind": "servers", "call": call, "urls": list(urls)}
        with_servers = [a for a in self._agents.values() if a.servers and a.lost is None]
        found = await asyncio.gather(
            *(agent.ask(question) for agent in with_servers), return_exceptions=True
        )
        values = []
        for agent, answer in zip(with_servers, found, strict=True):
            if isinstance(answer, NodeLost):
                continue
            if isinstance(answer, BaseException):
                raise answer
            if "user_error" in answer:
                raise UserError(f"{agent.where}{answer['user_error']}")
            values.append(answer.get("value"))
        return values

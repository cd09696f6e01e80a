"""The ranks' connections, at the controller's end.

Every rank asks the same questions in the same order, and waits for each answer. The answer to a
question, which its number tells from others, is decided once and is the same for all ranks. Imports
no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import megafork
from megafork.config import TrainConfig
from megafork.errors import UserError
from megafork.rollout.messages import Arrays, Header, Link, Pieces

Answer = tuple[Header, Pieces]


def settings_digest(config: TrainConfig) -> str:
    """Return a digest of the settings and of megafork's version."""
    whole = json.dumps([megafork.__version__, config.model_dump(mode="json")])
    return hashlib.sha256(whole.encode()).hexdigest()


@dataclass
class Question:
    """A question, which all ranks ask under one number."""

    kind: str
    number: int
    world_size: int
    timeout_s: float
    headers: dict[int, Header] = field(default_factory=dict)
    """What each rank said that has asked so far"""
    _failure: Exception | None = None
    _is_complete: asyncio.Event = field(default_factory=asyncio.Event)
    _is_lost: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def first(self) -> Header:
        """The header of the rank that asked first."""
        return next(iter(self.headers.values()))

    def add(self, rank: int, header: Header) -> None:
        self.headers[rank] = header
        if len(self.headers) == self.world_size:
            self._is_complete.set()

    def give_up(self, failure: Exception) -> None:
        """Note that a rank will not come any more."""
        self._failure = failure
        self._is_lost.set()

    async def unless_given_up(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Return what `work` returns. Raises RankLost, with the work given up, when a rank ends."""
        working = asyncio.create_task(work)
        lost = asyncio.create_task(self._is_lost.wait())
        try:
            await asyncio.wait({working, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
        if working.cancelled() and self._failure is not None:
            raise self._failure
        return working.result()

    async def by_all(self) -> list[Header]:
        """Wait until every rank has asked. Returns what each said, in rank order.

        Raises UserError that names the ranks that do not come in time.
        """
        try:
            await asyncio.wait_for(self._is_complete.wait(), self.timeout_s)
        except TimeoutError:
            absent = sorted(set(range(self.world_size)) - self.headers.keys())
            raise UserError(
                f"rank {', '.join(map(str, absent))} did not come to {self.kind} "
                f"within parallel.timeout_minutes={self.timeout_s / 60:g}: look at the process "
                "(py-spy dump --pid), or allow more time"
            ) from None
        return [self.headers[rank] for rank in range(self.world_size)]


class RankLost(Exception):
    """A rank has ended: it, or what started it, says why."""


class Ranks:
    """Answers the ranks. `answer` is called with each question once, when its first rank asks it.

    It may wait for the other ranks by `Question.by_all`. Its UserError is the answer to all ranks,
    and so is whatever else it raises, whose traceback is printed. rows: answers one rank's question
    for rows. note_signal: is told the name of a signal that some rank got. note_loss: is called
    when a rank has ended.
    """

    def __init__(
        self,
        world_size: int,
        timeout_s: float,
        answer: Callable[[Question], Coroutine[Any, Any, Answer]],
        rows: Callable[[Header, Arrays], Answer],
        note_signal: Callable[[str], None],
        note_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._world_size, self._timeout_s = world_size, timeout_s
        self._answer, self._rows, self._note_signal = answer, rows, note_signal
        self._note_loss = note_loss
        self._encoding = ThreadPoolExecutor(2, thread_name_prefix="rows")
        self._open: dict[int, tuple[Question, asyncio.Task[Answer]]] = {}
        """By number: the questions that some rank has not asked yet, and the newest"""
        self._lost: RankLost | None = None
        self.is_over = False
        """Ranks may leave from now on"""

    async def talk(self, rank: int, link: Link) -> None:
        """Answer a rank until its connection ends."""
        answering: set[asyncio.Task[None]] = set()
        try:
            while True:
                header, arrays = await link.receive()
                if header["kind"] == "signal":
                    self._note_signal(str(header["name"]))
                    continue
                task = asyncio.create_task(self._tell(rank, header, arrays, link))
                answering.add(task)
                task.add_done_callback(answering.discard)
        finally:
            if not self.is_over:
                self._lose(rank)

    def _lose(self, rank: int) -> None:
        self._lost = RankLost(f"rank {rank} ended")
        self._note_loss()
        for question, _ in self._open.values():
            question.give_up(self._lost)

    async def _tell(self, rank: int, header: Header, arrays: Arrays, link: Link) -> None:
        alive = asyncio.create_task(link.say_alive())
        answer: Answer
        try:
            if header["kind"] == "rows":
                loop = asyncio.get_running_loop()
                answer = await loop.run_in_executor(self._encoding, self._rows, header, arrays)
            else:
                answer = await asyncio.shield(self._decision(rank, header))
        except Exception as error:  # a question that is none: the rank raises it
            answer = {"kind": "error", "text": f"the controller does not answer: {error!r}"}, {}
        finally:
            alive.cancel()
        with contextlib.suppress(OSError):  # the rank has ended
            await link.send(*answer)

    def _decision(self, rank: int, header: Header) -> asyncio.Task[Answer]:
        """Return the task that decides the answer.

        Raises ValueError for a question that the other ranks do not ask under this number.
        """
        kind, number = str(header["kind"]), int(header["number"])
        if number not in self._open:
            self._open = {
                n: found
                for n, found in self._open.items()
                if len(found[0].headers) < self._world_size
            }
            question = Question(kind, number, self._world_size, self._timeout_s)
            question.add(rank, header)
            if self._lost is not None:
                question.give_up(self._lost)
            self._open[number] = question, asyncio.create_task(self._decided(question))
        question, decision = self._open[number]
        if question.kind != kind:
            raise ValueError(f"rank {rank} asks for {kind}, and others for {question.kind}")
        question.add(rank, header)
        return decision

    async def _decided(self, question: Question) -> Answer:
        try:
            return await question.unless_given_up(self._answer(question))
        except RankLost as error:
            return {"kind": "error", "text": str(error), "peer": True}, {}
        except UserError as error:
            return {"kind": "error", "text": str(error)}, {}
        except Exception as error:  # a fault of ours ends the run, and not this process alone
            traceback.print_exc()
            return {
                "kind": "error",
                "text": f"the controller failed at {question.kind}: "
                f"{type(error).__name__}: {error}",
            }, {}

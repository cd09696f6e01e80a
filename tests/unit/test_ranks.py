"""The ranks' questions at the controller: decided once, the same for all, bounded in time."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from megafork.controller.ranks import Ranks
from megafork.controller.stop import Stop, Stopped
from megafork.errors import UserError
from megafork.rollout.messages import connect, serve

KEY = "the run's key"


class Controller:
    """Answers each question with how often it was decided, and by whom it was asked."""

    def __init__(self, world_size, timeout_s=60.0):
        self.decided = []
        self.signals = []
        self.ranks = Ranks(world_size, timeout_s, self.answer, self.rows, self.signals.append)

    async def answer(self, question):
        self.decided.append(question.number)
        if question.kind == "together":
            said = await question.by_all()
            return {"kind": "said", "values": [header["value"] for header in said]}, {}
        if question.kind == "user":
            raise UserError("mend the setting")
        if question.kind == "fault":
            raise ZeroDivisionError("a fault")
        return {"kind": "first", "value": question.first["value"]}, {}

    def rows(self, header, arrays):
        raise KeyError(header["step"])

    @contextlib.asynccontextmanager
    async def links(self, count):
        async def talk(hello, link):
            await self.ranks.talk(hello["rank"], link)

        address = await serve("127.0.0.1", KEY, talk, 1 << 20)
        found = [await connect(address, KEY, {"rank": r}, 1 << 20) for r in range(count)]
        yield found
        for link in found:
            link.close()


async def ask(link, kind, number, value=None):
    await link.send({"kind": kind, "number": number, "value": value})
    return (await link.receive())[0]


def test_an_answer_is_decided_once_and_is_the_same_for_all():
    async def talk():
        controller = Controller(3)
        async with controller.links(3) as links:
            answers = await asyncio.gather(
                *(ask(link, "together", 1, rank) for rank, link in enumerate(links))
            )
            assert [answer["values"] for answer in answers] == [[0, 1, 2]] * 3
            # Rank 2 is first, and one question ahead when the others come.
            first = await ask(links[2], "alone", 2, 2)
            ahead = asyncio.create_task(ask(links[2], "together", 3, 2))
            later = [await ask(link, "alone", 2, rank) for rank, link in enumerate(links[:2])]
            assert [first, *later] == [{**first, "value": 2}] * 3
            assert await ask(links[0], "alone", 2, 0) == first  # it may be asked again
            rest = [ask(link, "together", 3, rank) for rank, link in enumerate(links[:2])]
            assert (await asyncio.gather(ahead, *rest))[0]["values"] == [0, 1, 2]
        assert controller.decided == [1, 2, 3]

    asyncio.run(talk())


def test_what_fails_is_an_answer(capfd):
    async def talk():
        controller = Controller(1)
        async with controller.links(1) as [link]:
            assert (await ask(link, "user", 1))["text"] == "mend the setting"
            told = await ask(link, "fault", 2)
            assert told["text"] == "the controller failed at fault: ZeroDivisionError: a fault"
            await link.send({"kind": "rows", "step": 7})
            assert "KeyError(7)" in (await link.receive())[0]["text"]
            await link.send({"kind": "batch"})  # without its number
            assert "does not answer: KeyError('number')" in (await link.receive())[0]["text"]
            await link.send({"kind": "signal", "name": "SIGTERM"})
            assert (await ask(link, "alone", 3, 1))["value"] == 1
            assert controller.signals == ["SIGTERM"]

    asyncio.run(talk())
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_ranks_that_ask_other_things_are_told():
    async def talk():
        async with Controller(2).links(2) as links:
            assert (await ask(links[0], "alone", 1, 0))["kind"] == "first"
            told = await ask(links[1], "user", 1)
            assert "rank 1 asks for user, and others for alone" in told["text"]

    asyncio.run(talk())


def test_a_rank_that_does_not_come_or_is_gone_is_named():
    async def talk():
        async with Controller(3, timeout_s=0.3).links(3) as links:
            first, second = await asyncio.gather(*(ask(link, "together", 1) for link in links[:2]))
            assert first == second
            assert first["text"].startswith("rank 2 did not come to together within parallel.")
        async with Controller(2).links(2) as links:
            asked = asyncio.create_task(ask(links[0], "together", 1))
            await asyncio.sleep(0)
            links[1].close()
            assert await asked == {**await asked, "peer": True, "text": "rank 1 ended"}
            assert (await ask(links[0], "together", 2))["peer"]

    asyncio.run(talk())


def test_a_stop_gives_up_what_is_waited_for():
    cleaned = []

    async def work(seconds):
        try:
            await asyncio.sleep(seconds)
        finally:
            cleaned.append(seconds)
        return seconds

    async def wait():
        stop = Stop()
        assert await stop.unless_asked(work(0)) == 0
        waiting = asyncio.create_task(stop.unless_asked(work(60)))
        await asyncio.sleep(0.01)
        stop.ask("SIGUSR1")
        stop.ask("SIGTERM")  # the first is the cause
        with pytest.raises(Stopped, match="SIGUSR1"):
            await waiting
        for late in (0, 60):  # what has ended is not used either
            with pytest.raises(Stopped, match="SIGUSR1"):
                await stop.unless_asked(work(late))
        with pytest.raises(Stopped):
            stop.check()

    asyncio.run(wait())
    assert cleaned[:2] == [0, 60]

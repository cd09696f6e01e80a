"""A server is healthy when its engine generates a token, or says that it is at something else."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from megafork.vllm_plugin import pulse
from megafork.vllm_plugin.pulse import Pulse


class Engine:
    """What is asked of vLLM's: each answer may never come."""

    def __init__(self, *, dead=False, sleeping=False, silent=False, generates=True):
        self.dead, self.sleeping, self.silent, self.generates = dead, sleeping, silent, generates
        self.num_tokens = 0

    async def check_health(self):
        if self.dead:
            raise RuntimeError("EngineDeadError")

    async def is_sleeping(self):
        if self.silent:
            await asyncio.Event().wait()
        return self.sleeping

    async def one_token(self):
        if not self.generates or self.silent:
            await asyncio.Event().wait()
        self.num_tokens += 1


def ailment_of(engine, *, generating=False, administering=False, times=1):
    async def ask():
        found = Pulse(lambda engine: engine.one_token())
        with stack_of(found, generating, administering):
            return await asyncio.gather(*(found.ailment(engine) for _ in range(times)))

    return asyncio.run(ask())


def stack_of(found, generating, administering):

    stack = contextlib.ExitStack()
    if generating:
        stack.enter_context(found.generation())
    if administering:
        stack.enter_context(found.administration())
    return stack


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(pulse, "HEALTH_S", 0.05)


def test_an_engine_that_generates_is_healthy():
    engine = Engine()
    assert ailment_of(engine) == [None]
    assert engine.num_tokens == 1


def test_one_that_answers_and_generates_nothing_is_not():
    assert ailment_of(Engine(generates=False)) == [
        "the engine has generated no token within 0.05 s"
    ]


@pytest.mark.parametrize("generating", [False, True])
def test_one_whose_loop_stands_still_is_not(generating):
    [found] = ailment_of(Engine(silent=True), generating=generating)
    assert "no token within" in found


def test_a_dead_one_is_not():
    assert ailment_of(Engine(dead=True)) == ["RuntimeError: EngineDeadError"]


@pytest.mark.parametrize("state", [{"sleeping": True}, {}], ids=["asleep", "busy"])
def test_one_that_is_at_something_else_is_asked_for_nothing(state):
    engine = Engine(generates=False, **state)
    assert ailment_of(engine, generating=not state) == [None]
    assert engine.num_tokens == 0


def test_one_that_takes_weights_may_be_silent():
    assert ailment_of(Engine(silent=True), administering=True) == [None]


@pytest.mark.parametrize("generating", [False, True])
def test_one_that_has_answered_may_be_in_a_long_step(monkeypatch, generating):
    """A step with many prompts takes minutes on a CPU, and the engine answers between steps."""
    monkeypatch.setattr(pulse, "SILENCE_S", 0.3)
    engine = Engine()

    async def ask():
        found = Pulse(lambda engine: engine.one_token())
        assert await found.ailment(engine) is None
        with stack_of(found, generating, administering=False):
            engine.silent = True
            assert await found.ailment(engine) is None
            while (told := await found.ailment(engine)) is None:
                pass
            assert "has not answered for" in told
            engine.silent = False
            assert await found.ailment(engine) is None
            engine.silent = True  # again: counted anew
            assert await found.ailment(engine) is None

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_many_who_ask_cost_one_token():
    engine = Engine()
    assert ailment_of(engine, times=50) == [None] * 50
    assert engine.num_tokens == 1

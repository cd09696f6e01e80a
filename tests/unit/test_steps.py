"""The controller's steps where servers are lost: what is asked of whom, and what is asked again.

The servers, their nodes and what they generate are scripts here; tests/runs has whole runs.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from megafork.controller.ranks import Question
from megafork.controller.steps import Steps
from megafork.controller.stop import Stop
from megafork.data.sample import Group, Sample
from megafork.errors import UserError
from megafork.rollout.collector import RolloutBatch
from tools.benchmarks.configs import learner_config

GROUP = Group(0, [1, 2], 1, [Sample(0, [3, 4], [-0.5, -0.25], False, 1.0, 1.0)])


class Servers:
    """One server: `dies` names the calls at which it does, once each."""

    def __init__(self, *dies):
        self.dies, self.calls, self.is_up, self.note = list(dies), [], True, print

    def _do(self, call):
        self.calls.append(call)
        if call in self.dies:
            self.dies.remove(call)
            self.is_up = False
        if not self.is_up:
            raise UserError(f"the server does not answer to {call}")

    async def wake_up(self, part):
        self._do(f"wake {part}")

    async def members(self):
        self._do("members")
        return [("http://server:1", self.calls.count("start again"))]

    async def pause(self, mode):
        self._do("pause")

    async def init_transfer(self, *arguments):
        self._do("join")

    async def start_weight_update(self):
        self._do("start")

    async def update_weights(self, buckets):
        self._do("update")

    async def finish_weight_update(self, version):
        self.version = version

    async def reset_prefix_cache(self, running): ...
    async def resume(self): ...
    async def look_again(self): ...

    async def weight_version(self):
        return self.version

    async def sleep(self):
        return [] if self.is_up else ["http://server:1"]

    def silent(self):
        return [] if self.is_up else ["http://server:1"]

    async def health(self):
        return self.is_up

    async def mark_lost(self):
        return int(not self.is_up)

    async def wait_for_one(self, timeout_s):
        self.is_up = True

    def counts(self):
        return {"rollout/servers": 1}


class Agents:
    def __init__(self, servers):
        self._servers = servers

    async def servers(self, call, urls=()):
        self._servers.calls.append(call.replace("_", " "))
        if call == "start_again":
            self._servers.is_up = True


class Generation:
    """Probes, evaluates and generates by the servers."""

    def __init__(self, servers):
        self._servers = servers

    async def probe(self):
        self._servers._do("probe")
        return [GROUP]

    async def evaluate(self, step):
        self._servers._do("evaluate")
        return 0.5

    async def batch(self, step, version):
        self._servers._do("batch")
        return RolloutBatch(groups=[GROUP], state={})

    async def give_up(self): ...


class Log:
    """metrics.jsonl and notes, as lists."""

    def __init__(self):
        self.rows, self.notes, self.run_dir = [], [], Path("unused")

    def row(self, step, row):
        self.rows.append((step, row))

    def note(self, text):
        self.notes.append(text)

    def has_row(self, step):
        return False

    def has_evaluated(self, step):
        return False


class Run:
    """A run of one rank, which does what the answers say."""

    def __init__(self, servers, **rollout):
        config = learner_config(
            "unused", rollout={"max_restarts": 3} | rollout, sync={"check_every": 0}
        )
        self.log, self.servers, self.probes, self.number = Log(), servers, 0, 0
        self.steps = Steps(config, servers, Agents(servers), Generation(servers), self.log, Stop())

    async def ask(self, kind, **said):
        self.number += 1
        question = Question(kind, self.number, 1, 60.0)
        question.add(0, said | {"kind": kind, "number": self.number})
        answer, _ = await self.steps.answer(question)
        self.probes += "probe" in answer
        return answer

    async def push(self, version):
        left = False
        while True:
            answer = await self.ask("push_begins", version=version, left=left)
            left = answer["kind"] == "leave"
            if answer["kind"] == "join":
                answer = await self.ask("join", offer={"address": {}, "buckets": []})
            if answer["kind"] == "send":
                answer = await self.ask("push_ended", failure=None, seconds={})
            if answer["kind"] in ("done", "stop"):
                return answer

    async def batch(self, step):
        while (answer := await self.ask("batch", step=step))["kind"] == "again":
            await self.push(step)
        return answer


COLOCATED = {"placement": "colocated"}


@pytest.mark.parametrize("rollout", [{}, COLOCATED], ids=["disaggregated", "colocated"])
@pytest.mark.parametrize("dies", ["pause", "join", "start", "update", "probe", "batch"])
def test_a_lost_server_is_pushed_to_again_and_compared_once(dies, rollout):
    """With sync.check_every=0 the first push alone is compared, and so must not be forgotten."""
    if dies == "pause" and rollout:
        dies = "wake weights"

    async def go():
        run = Run(Servers(dies), **rollout)
        run.steps.begin(0, None)
        await run.push(1)
        assert (await run.batch(1))["kind"] == "batch"
        assert run.probes == 1
        await run.push(2)
        assert run.probes == 1
        return run

    run = asyncio.run(go())
    assert run.servers.dies == []
    assert len([note for note in run.log.notes if "died and is replaced" in note]) == 1


@pytest.mark.parametrize("rollout", [{}, COLOCATED], ids=["disaggregated", "colocated"])
def test_each_death_has_a_new_server_until_there_were_too_many(rollout):
    async def go(deaths):
        run = Run(Servers(*["update"] * deaths), **rollout)
        run.steps.begin(0, None)
        await run.push(1)
        await run.batch(1)
        return run.servers.calls

    calls = asyncio.run(go(3))
    assert calls.count("start again" if rollout else "restart") == 3
    with pytest.raises(UserError, match=r"rollout\.max_restarts=3 new ones did not do"):
        asyncio.run(go(4))


def test_a_row_that_a_kill_left_unwritten_is_written_by_the_resume():
    async def go():
        run = Run(Servers())
        run.steps.begin(0, {"reward/mean": 0.25})
        await run.push(1)
        await run.batch(1)
        return run.log.rows

    assert asyncio.run(go()) == [(0, {"reward/mean": 0.25, "rollout/servers": 1})]


@pytest.mark.parametrize("rollout", [{}, COLOCATED], ids=["disaggregated", "colocated"])
def test_a_stop_answers_whatever_is_asked(rollout):
    async def go():
        run = Run(Servers(), **rollout)
        run.steps.begin(0, None)
        await run.push(1)
        run.steps.stop.ask("SIGTERM")
        for asked in (run.batch(1), run.push(2)):
            assert await asked == {"kind": "stop", "signal": "SIGTERM"}
        return run.servers.calls

    assert ("stop" in asyncio.run(go())) == bool(rollout)

"""Verifiers on other nodes: an agent there judges what the collector gives it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from concurrent.futures import CancelledError

import numpy as np
import psutil
import pytest

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.controller.child import Child
from megafork.data.prompts import Prompt
from megafork.data.sample import Sample
from megafork.data.tokenizer import load_tokenizer
from megafork.errors import UserError
from megafork.rollout.agents import Agents
from megafork.rollout.judging import Judging
from megafork.rollout.messages import serve
from megafork.verifiers.verifier import Judge
from tests.helpers.background import BackgroundLoop
from tests.helpers.commands import QUICKSTART
from tests.helpers.rollout_servers import wait_for

KEY = "of the run"
HERE = socket.gethostname()


class Node:
    """A controller's judging with one worker here, and another node's agent with one worker."""

    def __init__(self, stack, verifier, silence_s=60.0, **reward):
        settings = {"verifier": f"tests.helpers.verifiers:{verifier}", "workers": 1} | reward
        overrides = [f"reward.{name}={value}" for name, value in settings.items()]
        # Its servers are elsewhere.
        overrides += ["run.dir=unused", "rollout.url=http://nowhere:1"]
        config = load_config(TrainConfig, QUICKSTART / "config.toml", overrides)
        tokenizer = load_tokenizer(config, chat_template=False)
        judge = stack.enter_context(Judge(config.reward))
        self.judging = Judging(tokenizer, judge, max_response_tokens=32)
        self.notes = []
        self.agents = Agents(2, self.notes.append, silence_s)
        self.loop = stack.enter_context(BackgroundLoop())
        serving = serve("127.0.0.1", KEY, self.talk, 1 << 20)
        order = {
            "config": config.model_dump(mode="json"),
            "address": self.loop.submit(serving).result(),
            "key": KEY,
            "node": 1,
        }
        self.agent = stack.enter_context(Child("megafork.controller.agent", order))
        self.process = psutil.Process(self.agent.process.pid)
        wait_for(lambda: len(self.judging._busy) == 2)

    async def talk(self, hello, link):
        self.link = link
        await self.agents.talk(link, self.found())

    async def found(self):
        return self.judging

    def judge(self, count, prompt="12>10:", answer="3", **columns):
        """A job that judges responses of 1 to `count` tokens."""
        samples = [
            Sample(uid, np.arange(3, 4 + uid), [-0.5] * (uid + 1), False) for uid in range(count)
        ]
        return self.loop.submit(
            self.judging(Prompt(0, prompt, answer, [3], columns=columns), samples)
        )


@contextlib.contextmanager
def node(verifier, **reward):
    with contextlib.ExitStack() as stack:
        yield Node(stack, verifier, **reward)


def lengths(found, samples):
    """Of the responses' texts."""
    return [len(found.judging.tokenizer.decode(sample.token_ids)) for sample in samples]


def test_both_nodes_judge_and_say_the_same():
    with node("length_and_parent") as found:
        samples = found.judge(40).result()
        parents, said = zip(*(divmod(sample.reward, 1000) for sample in samples), strict=True)
        assert set(parents) == {os.getpid(), found.process.pid}
        assert list(said) == lengths(found, samples) and len(set(said)) > 5


def test_every_node_s_verifiers_are_handed_the_row_s_columns():
    with node("by_column") as found:
        assert {s.reward for s in found.judge(20, level=0.25).result()} == {0.25}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_node_loses_no_verdict(tmp_path, number):
    """One that is stopped says nothing any more."""
    with node("waits", timeout_s=600, silence_s=3.0) as found:
        job = found.judge(12, prompt=str(tmp_path))
        wait_for(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
        workers = found.process.children()
        found.process.send_signal(number)
        wait_for(lambda: found.notes)
        (tmp_path / "go").touch()
        samples = job.result()
        assert [sample.reward for sample in samples] == lengths(found, samples)
        [note] = found.notes
        assert note.startswith(f"warning: the verifiers on {HERE} are lost, and others go on. ")
        assert ("nothing was heard of it for 3 s" in note) == (number == signal.SIGSTOP)
        found.process.send_signal(signal.SIGKILL)
        assert psutil.wait_procs(workers, timeout=20)[1] == []


def test_verdicts_that_are_given_up_are_not_made(tmp_path):
    """Both nodes have one under way and five waiting, which would come first."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    with node("waits", timeout_s=600) as found:
        job = found.judge(12, prompt=str(first))
        wait_for(lambda: len(list(first.glob("begun-*"))) == 2)
        job.cancel()
        with contextlib.suppress(CancelledError):
            job.result()
        wait_for(lambda: set(found.judging._busy.values()) == {0})
        for folder in (first, second):
            (folder / "go").touch()
        assert len(found.judge(12, prompt=str(second)).result()) == 12
    assert len(list(second.glob("begun-*"))) == 12
    assert len(list(first.glob("begun-*"))) == 2


def test_a_verifiers_failures_and_complaints_are_told():
    with node("sometimes_broken") as found:
        samples = found.judge(30).result()
        assert {sample.failure for sample in samples} == {None, "error"}
        assert "error" in found.judging.judge.causes
    with node("refuses") as found, pytest.raises(UserError, match="an answer that is no answer"):
        found.judge(4).result()
    with node("no_such_function") as found, pytest.raises(UserError, match="no_such_function"):
        found.judge(4).result()


@pytest.mark.parametrize("whose", ["its rank's", "the controller's"])
def test_an_agent_ends_with_its_rank_and_with_the_controller(whose):
    with node("length") as found:
        found.judge(8).result()
        family = [found.process, *found.process.children(recursive=True)]
        assert len(family) == 2
        if whose == "its rank's":
            found.agent.process.stdin.close()
        else:
            found.loop.submit(closed(found.link)).result()
        assert found.agent.process.wait(20) == 0
        assert psutil.wait_procs(family, timeout=20)[1] == []


async def closed(link):
    link.close()

"""A node's agent: judges responses with verifiers on its node, for the collector on another one.

The first rank of each node but the collector's starts it (`Agent`). It ends when its connection to
the collector does, or the pipe from its rank: by any death of either.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from typing import Any, Self

from megafork.config import TrainConfig
from megafork.data.prompts import Prompt
from megafork.data.tokenizer import load_tokenizer
from megafork.errors import UserError
from megafork.interruption import SIGNALS
from megafork.rewards.verifier import Judge
from megafork.rollout.judging import LocalVerifiers
from megafork.rollout.messages import Arrays, Header, Link, connect

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
_START += "from megafork.rollout.agent import main; main()"
_MOST_BYTES = 1 << 30
_END_S = 10.0


class Agent:
    """The agent's process, as its rank sees it. Close it."""

    def __init__(self, config: TrainConfig, address: tuple[str, int], key: str) -> None:
        """address, key: the collector's."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal to the ranks' process groups is theirs alone
        )
        told = {"address": address, "key": key, "config": config.model_dump(mode="json")}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the collector misses it
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def main() -> None:
    """Run the agent: told on stdin, in a line of JSON, whom to judge for and how."""
    # Slurm and a terminal signal every process: the trainer alone decides what follows from it.
    for number in {*SIGNALS, signal.SIGINT, signal.SIGTERM}:
        signal.signal(number, lambda number, frame: None)
    told = json.loads(sys.stdin.buffer.readline())
    asyncio.run(_until_the_rank_ends(told))


async def _until_the_rank_ends(told: dict[str, Any]) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)  # nothing more is written to it
    work = asyncio.create_task(_work(told))
    end = asyncio.create_task(ended.wait())
    await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError, EOFError, OSError):
        await work


async def _work(told: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(told["config"])
    with Judge(config.reward) as judge:
        hello = {"role": "verifiers", "node": socket.gethostname(), "workers": judge.workers}
        link = await connect(tuple(told["address"]), told["key"], hello, _MOST_BYTES)
        try:
            tokenizer = load_tokenizer(
                config,
                chat_template=config.data.chat_template,
                enable_thinking=config.data.enable_thinking,
            )
        except UserError as error:
            await link.send({"kind": "broken", "cause": str(error)})
            return
        await _judge_all(link, LocalVerifiers(tokenizer, judge))


async def _judge_all(link: Link, verifiers: LocalVerifiers) -> None:
    complaints: list[str] = []
    verifiers.judge.tell = complaints.append
    async with asyncio.TaskGroup() as running:
        while True:
            question, arrays = await link.receive()
            running.create_task(_answer(link, verifiers, question, arrays, complaints))


async def _answer(
    link: Link,
    verifiers: LocalVerifiers,
    question: Header,
    arrays: Arrays,
    complaints: list[str],
) -> None:
    prompt = Prompt(-1, question["prompt"], question["answer"], [])
    answer: Header = {"kind": "verdict", "number": question["number"]}
    try:
        verdict = await verifiers.verdict(prompt, arrays["token_ids"])
        answer |= {"reward": verdict.reward, "accuracy": verdict.accuracy}
        answer["failure"] = verdict.failure
    except UserError as error:
        answer["user_error"] = str(error)
    except Exception as error:  # the collector raises it
        answer["error"] = f"{type(error).__name__}: {error}"
    told = complaints.pop() if complaints else ""
    await link.send(answer | {"causes": verifiers.judge.causes, "told": told})

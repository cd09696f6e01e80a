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
from functools import partial
from typing import Any, Self

from megafork.config import RewardConfig
from megafork.errors import UserError
from megafork.interruption import SIGNALS
from megafork.rewards.verifier import Judge
from megafork.rollout.messages import Header, Link, connect

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
_START += "from megafork.rollout.agent import main; main()"
_END_S = 10.0


class Agent:
    """The agent's process, as its rank sees it. Close it."""

    def __init__(self, config: RewardConfig, address: tuple[str, int], key: str) -> None:
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
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def _work(told: dict[str, Any]) -> None:
    with Judge(RewardConfig.model_validate(told["config"])) as judge:
        hello = {"role": "verifiers", "node": socket.gethostname(), "workers": judge.workers}
        try:
            link = await connect(tuple(told["address"]), told["key"], hello, most_bytes=0)
        except OSError as error:
            where = ":".join(map(str, told["address"]))
            cause = f"rank 0 is not to be reached at {where} ({error})"
            print(f"warning: other nodes judge alone: {cause}", file=sys.stderr, flush=True)
            return
        await _judge_all(link, judge)


async def _judge_all(link: Link, judge: Judge) -> None:
    complaints: list[str] = []
    judge.tell = complaints.append
    running: dict[int, asyncio.Task[None]] = {}
    with contextlib.suppress(EOFError, OSError):  # the collector has ended
        while True:
            asked, _ = await link.receive()
            number = asked["number"]
            if asked["kind"] == "forget":
                if number in running:
                    running[number].cancel()
                continue
            running[number] = asyncio.create_task(_answer(link, judge, asked, complaints))
            running[number].add_done_callback(partial(_forget, running, number))


def _forget(running: dict[int, asyncio.Task[None]], number: int, ended: object) -> None:
    del running[number]


async def _answer(link: Link, judge: Judge, question: Header, complaints: list[str]) -> None:
    answer: Header = {"kind": "verdict", "number": question["number"]}
    try:
        verdict = await judge(question["prompt"], question["response"], question["answer"])
        answer |= {"reward": verdict.reward, "accuracy": verdict.accuracy}
        answer["failure"] = verdict.failure
    except UserError as error:
        answer["user_error"] = str(error)
    except Exception as error:  # the collector raises it
        answer["error"] = f"{type(error).__name__}: {error}"
    told = complaints.pop() if complaints else ""
    with contextlib.suppress(OSError):  # nobody waits for it
        await link.send(answer | {"causes": judge.causes, "told": told})

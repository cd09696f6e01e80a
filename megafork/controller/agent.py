"""The agent of a node: its servers and verifiers, in a process that the node's first rank starts.

The controller tells it what to judge and which servers to start again. It ends with its rank, and
what it has started ends with it. Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megafork.config import RewardConfig, TrainConfig
from megafork.controller.child import answer_rank, read_order, run_until_the_rank_ends
from megafork.controller.ranks import settings_digest
from megafork.errors import UserError
from megafork.rollout.engine import LocalServers, served_policy, start_here
from megafork.rollout.messages import Header, Link, connect
from megafork.rollout.placement import NodeDevices
from megafork.rollout.vllm_server import log_paths
from megafork.verifiers.verifier import Judge
from megafork.weights.reach import is_local


def main() -> None:
    """Run the agent until its rank ends."""
    order = read_order()
    run_until_the_rank_ends(partial(_work, order))


async def _work(order: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(order["config"])
    with contextlib.ExitStack() as stack:
        hello: Header = {"role": "agent", "settings": settings_digest(config)}
        found: Header = {"kind": "here", "node": order["node"], "host": socket.gethostname()}
        servers: LocalServers | None = None
        try:
            if config.rollout.url is None:
                servers, logs = _start_servers(config, order)
                stack.enter_context(servers)
                found["servers"] = list(zip(servers.urls, map(str, logs), strict=True))
        except UserError as error:
            found["failure"] = str(error)
        except Exception as error:  # the controller would wait for this node in vain
            found["failure"] = f"its servers cannot be started: {type(error).__name__}: {error}"
        judge: Judge | None = None
        if order["node"] > 0:  # the first node's verifiers are the controller's own
            judge = stack.enter_context(Judge(RewardConfig.model_validate(config.reward)))
            found["workers"] = judge.workers
        address = tuple(order["address"])
        try:
            link = await connect(address, order["key"], hello, most_bytes=0)
            await link.send(found)
        except OSError as error:
            cause = f"the controller is not to be reached at {address[0]}:{address[1]} ({error})"
            print(f"error: {cause}: every node needs a way to it", file=sys.stderr, flush=True)
            return
        answer_rank(order, {})
        link.silence_s = config.run.silence_s
        alive = asyncio.create_task(link.say_alive())
        try:
            await _obey(link, judge, servers)
        finally:
            alive.cancel()


def _start_servers(config: TrainConfig, order: dict[str, Any]) -> tuple[LocalServers, list[Path]]:
    """Make this node's share of the run's servers, to be entered; return it with the logs."""
    rollout, node = config.rollout, order["node"]
    logs = log_paths(Path(config.run.dir) / "vllm.log", order["num_nodes"] * rollout.servers)
    logs = logs[node * rollout.servers : (node + 1) * rollout.servers]
    colocated = rollout.placement == "colocated"
    devices = NodeDevices(
        order["device"],
        num_trainers=order["num_trainers"],
        shared=colocated,
        sees_trainers=is_local(config.sync, colocated),
    )
    servers = start_here(
        served_policy(config),
        rollout,
        devices,
        logs,
        api_key=order["key"],
        host=order["host"],
        max_restarts=rollout.max_restarts,
    )
    return servers, logs


async def _obey(link: Link, judge: Judge | None, servers: LocalServers | None) -> None:
    complaints: list[str] = []
    if judge is not None:
        judge.tell = complaints.append
    running: dict[int, asyncio.Task[None]] = {}
    with contextlib.suppress(EOFError, OSError):  # the controller has ended, or hangs
        while True:
            asked, _ = await link.receive()
            number = asked["number"]
            if asked["kind"] == "forget":
                if number in running:
                    running[number].cancel()
                continue
            if asked["kind"] == "servers":
                assert servers is not None
                work = _administer(link, servers, asked)
            else:
                assert judge is not None
                work = _answer(link, judge, asked, complaints)
            running[number] = asyncio.create_task(work)
            running[number].add_done_callback(partial(_forget, running, number))


def _forget(running: dict[int, asyncio.Task[None]], number: int, ended: object) -> None:
    del running[number]


async def _administer(link: Link, servers: LocalServers, asked: Header) -> None:
    """Do what the controller asks of the node's servers, and say how it went."""
    calls: dict[str, Callable[[], Any]] = {
        "wait": servers.wait,
        "restart": lambda: servers.restart(asked["urls"]),
        "end": lambda: servers.end(asked["urls"]),
        "start_again": lambda: servers.start_again(asked["urls"]),
        "forgive": servers.forgive,
        "stop": servers.stop,
        "given_up": servers.given_up,
    }
    answer: Header = {"kind": "done", "number": asked["number"]}
    try:
        answer["value"] = await asyncio.to_thread(calls[asked["call"]])
    except UserError as error:
        answer["user_error"] = str(error)
    with contextlib.suppress(OSError):  # nobody waits for it
        await link.send(answer)


async def _answer(link: Link, judge: Judge, question: Header, complaints: list[str]) -> None:
    answer: Header = {"kind": "verdict", "number": question["number"]}
    try:
        asked = question["prompt"], question["response"], question["answer"]
        verdict = await judge(*asked, question.get("columns", {}))
        answer |= {"reward": verdict.reward, "accuracy": verdict.accuracy}
        answer["failure"] = verdict.failure
    except UserError as error:
        answer["user_error"] = str(error)
    except Exception as error:  # the controller raises it
        answer["error"] = f"{type(error).__name__}: {error}"
    told = complaints.pop() if complaints else ""
    with contextlib.suppress(OSError):  # nobody waits for it
        await link.send(answer | {"causes": judge.causes, "told": told})

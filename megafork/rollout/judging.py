"""Verdicts on samples, by the verifiers of all nodes: each one goes to the node with most room.

Tokens become text here (1 us of CPU a token), so that other nodes need no tokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from megafork.data.prompts import Prompt
from megafork.data.tokenizer import Tokenizer
from megafork.errors import UserError
from megafork.rewards.overlong import overlong_punishment
from megafork.rewards.verifier import Judge, Verdict
from megafork.rollout.messages import Header, Link
from megafork.sample import Sample


class NodeLost(Exception):
    """The verifiers of a node have ended, or cannot be reached."""


class Verifiers(Protocol):
    """The verifiers of one node."""

    workers: int
    """How many responses it judges at once"""

    async def __call__(self, prompt: str, response: str, answer: str) -> Verdict:
        """As `Judge`, and raises NodeLost."""


class RemoteVerifiers:
    """Those of another node, whose agent (agent.py) is at the other end of the link."""

    def __init__(self, link: Link, node: str, workers: int, judge: Judge) -> None:
        self.node, self.workers = node, workers
        self._link, self._judge = link, judge
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Header]] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._lost: str | None = None

    async def __call__(self, prompt: str, response: str, answer: str) -> Verdict:
        if self._lost is not None:
            raise NodeLost(self._lost)
        number = next(self._numbers)
        answered: asyncio.Future[Header] = asyncio.get_running_loop().create_future()
        self._asked[number] = answered
        question = {"prompt": prompt, "response": response, "answer": answer}
        try:
            try:
                await self._link.send({"kind": "judge", "number": number} | question)
            except OSError as error:
                raise NodeLost(f"connection lost: {error}") from error
            return self._read(await answered)
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
        try:
            while True:
                header, _ = await self._link.receive()
                answered = self._asked.get(header["number"])
                if answered is not None and not answered.done():
                    answered.set_result(header)
        except Exception as error:  # its end, or an answer that is none
            self._lost = f"connection lost: {error!r}"
        for answered in self._asked.values():
            if not answered.done():
                answered.set_exception(NodeLost(self._lost))
        return self._lost

    def _read(self, answer: Header) -> Verdict:
        for kind, cause in answer["causes"].items():
            self._judge.causes.setdefault(kind, f"{cause} (on {self.node})")
        if answer["told"]:
            self._judge.tell(answer["told"])
        if "user_error" in answer:
            raise UserError(f"{answer['user_error']} (on {self.node})")
        if "error" in answer:
            raise RuntimeError(f"the verifiers on {self.node} broke: {answer['error']}")
        return Verdict(answer["reward"], answer["accuracy"], answer["failure"])


class Judging:
    """Judges samples by this node's verifiers and those of nodes that `join`."""

    def __init__(self, tokenizer: Tokenizer, judge: Judge, max_response_tokens: int) -> None:
        self.tokenizer, self.judge = tokenizer, judge
        self.max_response_tokens = max_response_tokens
        self.note: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self._busy: dict[Verifiers, int] = {judge: 0}
        """Of each node: responses that it judges or has waiting"""

    async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Sample]:
        """Judge the responses to one prompt; rewards have lost what long ones lose."""
        return await asyncio.gather(*(self._judged(prompt, sample) for sample in samples))

    async def verdict(self, prompt: Prompt, token_ids: np.ndarray) -> Verdict:
        """Judge one response; where its node is lost, by another. Raises UserError as `Judge`."""
        text = await asyncio.to_thread(self.tokenizer.decode, token_ids)
        while True:
            node = min(self._busy, key=lambda n: (self._busy[n] + 1) / n.workers)
            self._busy[node] += 1
            try:
                return await node(prompt.text, text, prompt.answer)
            except NodeLost:
                self._busy.pop(node, None)
            finally:
                if node in self._busy:
                    self._busy[node] -= 1

    async def join(self, hello: dict[str, Any], link: Link) -> None:
        """Use the verifiers of the node whose agent called, until it is lost."""
        node = RemoteVerifiers(link, hello["node"], hello["workers"], self.judge)
        self._busy[node] = 0
        why = await node.hear()
        self._busy.pop(node, None)
        self.note(f"warning: the verifiers on {node.node} are lost, and others go on. {why}")

    async def _judged(self, prompt: Prompt, sample: Sample) -> Sample:
        verdict = await self.verdict(prompt, sample.token_ids)
        reward = verdict.reward - overlong_punishment(
            sample.num_tokens,
            self.judge.config,
            max_response_tokens=self.max_response_tokens,
        )
        return replace(sample, reward=reward, accuracy=verdict.accuracy, failure=verdict.failure)

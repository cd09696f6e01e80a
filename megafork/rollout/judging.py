"""Verdicts on samples, by the verifiers of all nodes: each one goes to the node with most room.

Tokens become text here (1 us of CPU a token), so that other nodes need no tokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from megafork.data.prompts import Prompt
from megafork.data.sample import Sample
from megafork.data.tokenizer import Tokenizer
from megafork.rollout.agents import NodeLost
from megafork.verifiers.overlong import overlong_punishment
from megafork.verifiers.verifier import Judge, Verdict


class Verifiers(Protocol):
    """The verifiers of one node."""

    workers: int
    """Responses that it judges at once"""

    async def __call__(
        self, prompt: str, response: str, answer: str, columns: Mapping[str, Any]
    ) -> Verdict:
        """Judge a response as `Judge` does. Raises NodeLost."""


class Judging:
    """Judges samples by this node's verifiers and those of nodes that `join`."""

    def __init__(self, tokenizer: Tokenizer, judge: Judge, max_response_tokens: int) -> None:
        self.tokenizer, self.judge = tokenizer, judge
        self.max_response_tokens = max_response_tokens
        self._decoding = ThreadPoolExecutor(2, thread_name_prefix="decoding")
        self._busy: dict[Verifiers, int] = {judge: 0}
        """Of each node: responses that it judges or has waiting"""

    async def __call__(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Sample]:
        """Judge the responses to one prompt; what long ones lose is taken off their rewards."""
        return await asyncio.gather(*(self._judged(prompt, sample) for sample in samples))

    async def verdict(self, prompt: Prompt, token_ids: np.ndarray) -> Verdict:
        """Judge one response, by another node where one is lost. Raises UserError as `Judge`."""
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._decoding, self.tokenizer.decode, token_ids)
        while True:
            node = min(self._busy, key=lambda n: (self._busy[n] + 1) / n.workers)
            self._busy[node] += 1
            try:
                return await node(prompt.text, text, prompt.answer, prompt.columns)
            except NodeLost:
                self._busy.pop(node, None)
            finally:
                if node in self._busy:
                    self._busy[node] -= 1

    def add(self, verifiers: Verifiers) -> None:
        """Use another node's verifiers too."""
        self._busy[verifiers] = 0

    def drop(self, verifiers: Verifiers) -> None:
        self._busy.pop(verifiers, None)

    async def _judged(self, prompt: Prompt, sample: Sample) -> Sample:
        verdict = await self.verdict(prompt, sample.token_ids)
        reward = verdict.reward - overlong_punishment(
            sample.num_tokens,
            self.judge.config,
            max_response_tokens=self.max_response_tokens,
        )
        return replace(sample, reward=reward, accuracy=verdict.accuracy, failure=verdict.failure)

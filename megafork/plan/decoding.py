"""Seconds that a vLLM server takes for its responses: every iteration of its decoding, added up."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

ORDER_SEED = 0
"""of the order in which short and long responses come"""


@dataclass(frozen=True)
class Iteration:
    """One decoding step: fixed + max(weights, running * per_response) + held * per_kv_token."""

    fixed: float
    """seconds: scheduler, sampling, kernel launches, latency of all-reduces"""
    weights: float
    """seconds to read the weights once"""
    per_response: float
    """seconds of the matrices' products for one more token"""
    per_kv_token: float
    """seconds to read one token's keys and values"""

    def seconds(self, steps: int, running: int, held: int) -> float:
        """Of `steps` iterations of `running` responses, which hold `held` tokens at first."""
        read = steps * held + running * steps * (steps - 1) // 2
        matrices = max(self.weights, running * self.per_response)
        return steps * (self.fixed + matrices) + read * self.per_kv_token


def decode(lengths: Sequence[int], prompt: int, at_once: int, iteration: Iteration) -> float:
    """Seconds until the last of `lengths` is done, `at_once` of them running as long as there are.

    A response starts when another has ended; the last ones run alone, in a batch that empties.
    """
    waiting = list(lengths)
    random.Random(ORDER_SEED).shuffle(waiting)
    clock, seconds, held = 0, 0.0, 0
    running: list[tuple[int, int]] = []  # (iteration in which it ends, its tokens)
    while waiting or running:
        while waiting and len(running) < at_once:
            length = waiting.pop()
            heapq.heappush(running, (clock + length, length))
            held += prompt
        steps = running[0][0] - clock
        seconds += iteration.seconds(steps, len(running), held)
        held += steps * len(running)
        clock += steps
        while running and running[0][0] == clock:
            held -= prompt + heapq.heappop(running)[1]
    return seconds

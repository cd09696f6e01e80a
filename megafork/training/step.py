"""Scoring, selection and updates of one rollout batch, in the order that the config asks for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megafork.algorithms.forking import Selection
from megafork.model.scorer import Scores
from megafork.training.policy import Policy
from megafork.types import TokenTable


@dataclass
class Clock:
    """Seconds of each phase of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


@dataclass
class Optimized:
    """What came out of the updates of one rollout batch, mini-batch by mini-batch."""

    scores: list[Scores]
    """with the entropies that were selected by"""
    masks: list[Tensor] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    """one for each threshold scope; none before the last stage"""
    updates: list[dict[str, float]] = field(default_factory=list)


def optimize(
    policy: Policy, minibatches: Sequence[TokenTable], *, step: int, clock: Clock
) -> Optimized:
    """One optimizer step for each mini-batch; `policy.forking` says by whose entropies.

    All mini-batches are scored before the first update: the denominator of the ratio is the policy
    that sampled them. With entropy_of = "current" each but the first is scored once more, just
    before its own update, for the entropies.
    """
    with clock.measure("score"):
        done = Optimized([policy.score(minibatch) for minibatch in minibatches])
    current = policy.forking.entropy_of == "current"
    if not current:
        with clock.measure("score"):
            _select(policy, minibatches, done, step)
    for index, minibatch in enumerate(minibatches):
        if current:
            with clock.measure("score"):
                if index > 0:
                    _score_again(policy, minibatch, done, index)
                masks, selection = policy.select([minibatch], [done.scores[index]], step=step)
                _add(done, masks, selection)
        with clock.measure("update"):
            done.updates.append(policy.update(minibatch, done.scores[index], done.masks[index]))
    return done


def _select(policy: Policy, minibatches: Sequence[TokenTable], done: Optimized, step: int) -> None:
    """One threshold for the whole rollout batch, or each mini-batch by itself."""
    pairs = list(zip(minibatches, done.scores, strict=True))
    for scope in [pairs] if policy.forking.scope == "batch" else [[pair] for pair in pairs]:
        tables, scores = zip(*scope, strict=True)
        _add(done, *policy.select(tables, scores, step=step))


def _score_again(policy: Policy, minibatch: TokenTable, done: Optimized, index: int) -> None:
    now = policy.score(minibatch)
    assert torch.equal(now.rows_N, done.scores[index].rows_N), "another packing"
    done.scores[index] = replace(done.scores[index], entropy_N=now.entropy_N)


def _add(done: Optimized, masks: list[Tensor], selection: Selection | None) -> None:
    done.masks += masks
    done.selections += [selection] if selection is not None else []

"""Scoring, selection and updates of one rollout batch, in the order that the config asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megafork.algorithms.forking import Selection
from megafork.model.scorer import Scores
from megafork.training.guard import UpdateRefused
from megafork.training.policy import Policy
from megafork.types import TokenTable


@dataclass
class Clock:
    """Seconds of each phase of a step; `enter` is told when one begins."""

    enter: Callable[[str], None] = lambda phase: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        self.enter(phase)
        started = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


@dataclass(frozen=True)
class Skipped:
    """A mini-batch without an update, and why there was none."""

    number: int
    table: TokenTable
    reason: str


@dataclass
class Optimized:
    """What came out of a rollout batch, mini-batch by mini-batch."""

    tables: list[TokenTable] = field(default_factory=list)
    """the mini-batches that could be scored"""
    scores: list[Scores] = field(default_factory=list)
    """of these, with the entropies that were selected by"""
    masks: list[Tensor] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    """one for each threshold scope; none before the last stage"""
    updates: list[dict[str, float]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def optimize(
    policy: Policy, minibatches: Sequence[TokenTable], *, step: int, clock: Clock
) -> Optimized:
    """One optimizer step for each mini-batch; `policy.forking` says by whose entropies.

    All mini-batches are scored before the first update: the denominator of the ratio is the policy
    that sampled them. With entropy_of = "current" each but the first is scored once more, just
    before its own update, for the entropies. A mini-batch that cannot be trained on is skipped.
    """
    done = Optimized()
    numbers = []
    with clock.measure("score"):
        for number, table in enumerate(minibatches):
            scores = _score(policy, table)
            if isinstance(scores, str):
                policy.guard.skipped()
                done.skipped.append(Skipped(number, table, scores))
            else:
                numbers.append(number)
                done.tables.append(table)
                done.scores.append(scores)
    current = policy.forking.entropy_of == "current"
    if not current and done.tables:
        with clock.measure("score"):
            _select(policy, done, step)
    for index, table in enumerate(done.tables):
        if current:
            with clock.measure("score"):
                if index > 0:
                    _score_again(policy, table, done, index)
                masks, selection = policy.select([table], [done.scores[index]], step=step)
                _add(done, masks, selection)
        with clock.measure("update"):
            try:
                done.updates.append(policy.update(table, done.scores[index], done.masks[index]))
            except UpdateRefused as refusal:
                policy.guard.skipped()
                done.skipped.append(Skipped(numbers[index], table, str(refusal)))
    return done


def _data_fault(table: TokenTable) -> str | None:
    """What makes a mini-batch unfit to train on before it is scored."""
    for name, column, uids in (
        ("reward", table.reward_B, table.uid_B),
        ("rollout_logprob", table.rollout_logprob_R, table.uid_B[table.sample_R]),
    ):
        bad = ~column.isfinite()
        if bad.any():
            return f"a {name} of response {int(uids[bad][0])} is {float(column[bad][0])}"
    return None


def _score(policy: Policy, table: TokenTable) -> Scores | str:
    """The scores, or what is wrong; the same on all ranks."""
    fault = _data_fault(table)
    if fault is not None:
        return fault
    scores = policy.score(table)
    finite = scores.old_logprobs_N.isfinite().all() and scores.entropy_N.isfinite().all()
    if policy.topology.any_rank(not finite):
        return "a log-probability or an entropy of the policy is not finite"
    return scores


def _select(policy: Policy, done: Optimized, step: int) -> None:
    """One threshold for the whole rollout batch, or each mini-batch by itself."""
    pairs = list(zip(done.tables, done.scores, strict=True))
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

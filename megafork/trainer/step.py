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
from megafork.parallel.topology import Topology
from megafork.trainer.critic import Critic, estimate_advantages
from megafork.trainer.guard import UpdateRefused
from megafork.trainer.policy import Policy
from megafork.types import TokenTable


@dataclass
class Clock:
    """Seconds of each phase of a step; `enter` is told when one begins.

    A phase within another one is not counted in that.
    """

    enter: Callable[[str], None] = lambda phase: None
    seconds: dict[str, float] = field(default_factory=dict)
    _within: float = 0.0

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        self.enter(phase)
        started, outer = time.monotonic(), self._within
        self._within = 0.0
        try:
            yield
        except BaseException:
            self._within += outer
            raise
        taken = time.monotonic() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + taken - self._within
        self._within = outer + taken


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
    """the mini-batches that could be scored and selected from"""
    scores: list[Scores] = field(default_factory=list)
    """of these, with the entropies that were selected by"""
    masks: list[Tensor] = field(default_factory=list)
    reference_masks: list[Tensor] = field(default_factory=list)
    """what the reference's entropies would have selected, in steps that compare"""
    selections: list[Selection] = field(default_factory=list)
    """one for each threshold scope; none before the last stage"""
    updates: list[dict[str, float]] = field(default_factory=list)
    critic_updates: list[dict[str, float]] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    """what the critic thinks of the rollout batch (see estimate_advantages)"""
    skipped: list[Skipped] = field(default_factory=list)
    num_empty: int = 0
    """mini-batches without a token in the loss, which are in none of the lists"""


def optimize(
    policy: Policy,
    minibatches: Sequence[TokenTable],
    *,
    step: int,
    clock: Clock,
    critic: Critic | None = None,
) -> Optimized:
    """One optimizer step for each mini-batch; `policy.forking` says by whose entropies.

    All mini-batches are scored before the first update: the denominator of the ratio is the policy
    that sampled them. With entropy_of = "current" each after the first update is scored once more,
    just before its own, for the entropies. With old_logprobs = "engine" that denominator is
    known, and a mini-batch is scored for its entropies alone, if anything looks at them. A
    mini-batch that cannot be trained on is skipped; one whose every response was cut is counted
    and left out, with neither an update nor a place in a threshold.

    A critic gives the advantages, before the first update too, and learns from the same
    mini-batches. It and the policy both make their update or neither does, whichever is refused.
    """
    num_all = len(minibatches)
    minibatches = [table for table in minibatches if table.num_loss_tokens]
    done = Optimized(num_empty=num_all - len(minibatches))
    with clock.measure("score"):
        scored = [_score_first(policy, table) for table in minibatches]
    if policy.reference is not None and (policy.kl.coefficient or _compares(policy, step)):
        with clock.measure("reference"), policy.reference.in_place():
            scored = [_score_again(policy, *pair) for pair in zip(minibatches, scored, strict=True)]
    if critic is not None:
        with clock.measure("value"):
            estimated = estimate_advantages(critic, minibatches, scored)
        minibatches, scored, done.values = estimated.tables, estimated.scores, estimated.metrics
    if policy.forking.entropy_of == "old":
        with clock.measure("score"):
            _select(policy, minibatches, scored, done, step)
    index = 0
    for number, (table, scores) in enumerate(zip(minibatches, scored, strict=True)):
        fault: str | None = None
        if isinstance(scores, str):
            fault = scores
        elif policy.forking.entropy_of == "current":
            with clock.measure("score"):
                fault = _select_now(policy, table, scores, done, step)
        if fault is None:
            with clock.measure("update"):
                fault = update_both(policy, critic, done, index, step)
            index += 1
        if fault is not None:
            policy.guard.skipped()
            done.skipped.append(Skipped(number, table, fault))
            if policy.guard.is_exhausted:
                break
    return done


def _data_fault(table: TokenTable, topology: Topology) -> str | None:
    """What makes a mini-batch unfit to train on before it is scored; the same on all ranks."""
    bad_B = ~table.reward_B.isfinite()
    if bad_B.any():
        uid, reward = int(table.uid_B[bad_B][0]), float(table.reward_B[bad_B][0])
        return f"a reward of response {uid} is {reward}"
    bad_R = ~table.rollout_logprob_R.isfinite()
    if not topology.any_rank(bool(bad_R.any())):
        return None
    found = zip(
        table.sample_R[bad_R].tolist(), table.rollout_logprob_R[bad_R].tolist(), strict=True
    )
    everywhere = [one for one in topology.all_gather_object(next(found, None)) if one is not None]
    sample, logprob = min(everywhere, key=lambda one: one[0])
    return f"a rollout_logprob of response {int(table.uid_B[sample])} is {logprob}"


def _score_first(policy: Policy, table: TokenTable) -> Scores | str:
    """The scores of the policy before the batch's first update, as far as anything needs them."""
    entropies = policy.needs_entropies and policy.forking.entropy_of == "old"
    if entropies or not policy.ratio_to_engine:
        return _score(policy, table)
    return _data_fault(table, policy.topology) or policy.unscored(table)


def _score(policy: Policy, table: TokenTable, whose: str = "policy") -> Scores | str:
    """The scores, or what is wrong; the same on all ranks."""
    fault = _data_fault(table, policy.topology)
    if fault is not None:
        return fault
    scores = policy.score(table)
    finite = scores.old_logprobs_N.isfinite().all() and scores.entropy_N.isfinite().all()
    if policy.topology.any_rank(not finite):
        return f"a log-probability or an entropy of the {whose} is not finite"
    return scores


def _score_again(policy: Policy, table: TokenTable, scores: Scores | str) -> Scores | str:
    """The scores with those of the reference, whose weights the policy has now."""
    if isinstance(scores, str):
        return scores
    reference = _score(policy, table, whose="reference policy")
    if isinstance(reference, str):
        return reference
    assert torch.equal(reference.rows_N, scores.rows_N), "another packing"
    return replace(scores, reference=reference)


def _compares(policy: Policy, step: int) -> bool:
    every = policy.forking.compare_every
    return bool(every) and step % every == 0


def _select(
    policy: Policy,
    minibatches: Sequence[TokenTable],
    scored: Sequence[Scores | str],
    done: Optimized,
    step: int,
) -> None:
    """One threshold for the whole rollout batch, or each mini-batch by itself."""
    pairs = [
        (table, scores)
        for table, scores in zip(minibatches, scored, strict=True)
        if isinstance(scores, Scores)
    ]
    whole = [pairs] if pairs else []
    for scope in whole if policy.forking.scope == "batch" else [[pair] for pair in pairs]:
        tables, scores = zip(*scope, strict=True)
        _select_from(policy, tables, scores, done, step)


def _select_now(
    policy: Policy, table: TokenTable, scores: Scores, done: Optimized, step: int
) -> str | None:
    """By the entropies of the policy as it is; before the first update they are that already."""
    if policy.needs_entropies and (done.updates or not scores.has_entropies):
        now = _score(policy, table)
        if isinstance(now, str):
            return now
        assert torch.equal(now.rows_N, scores.rows_N), "another packing"
        scores = replace(scores, entropy_N=now.entropy_N, has_entropies=True)
        if not done.updates:
            scores = replace(scores, old_logprobs_N=now.old_logprobs_N, has_logprobs=True)
    _select_from(policy, [table], [scores], done, step)
    return None


def update_both(
    policy: Policy, critic: Critic | None, done: Optimized, index: int, step: int
) -> str | None:
    """The updates on the index-th of the selected mini-batches; says why there were none."""
    learners: list[tuple[Policy | Critic, list[dict[str, float]]]] = []
    if critic is None or step > critic.config.alone_steps:
        learners.append((policy, done.updates))
    if critic is not None:
        learners.append((critic, done.critic_updates))
    parts = done.tables[index], done.scores[index], done.masks[index]
    try:
        judged = [learner.judged_update(*parts) for learner, _ in learners]
    except UpdateRefused as refusal:
        return str(refusal)
    for (learner, updates), update in zip(learners, judged, strict=True):
        updates.append(learner.apply(update))
    policy.guard.went_on()  # also where the critic alone has learnt
    return None


def _select_from(
    policy: Policy,
    tables: Sequence[TokenTable],
    scores: Sequence[Scores],
    done: Optimized,
    step: int,
) -> None:
    """The tokens of one threshold scope."""
    masks, selection = policy.select(tables, scores, step=step)
    done.tables += tables
    done.scores += scores
    done.masks += masks
    done.selections += [selection] if selection is not None else []
    if _compares(policy, step):
        by_reference = [s.reference for s in scores if s.reference is not None]
        done.reference_masks += policy.select(tables, by_reference, step=step)[0]

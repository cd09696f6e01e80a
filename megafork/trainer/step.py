"""Scoring, selection and updates of one rollout batch, in the order that the config asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megafork.data.token_table import TokenTable
from megafork.model.scorer import Scores
from megafork.trainer.clock import Clock
from megafork.trainer.critic import Critic, estimate_advantages
from megafork.trainer.outcome import Optimized, Skipped
from megafork.trainer.policy import Policy
from megafork.trainer.scores import score, score_again, score_first
from megafork.trainer.update import update_both


def optimize(
    policy: Policy,
    minibatches: Sequence[TokenTable],
    *,
    step: int,
    clock: Clock,
    critic: Critic | None = None,
) -> Optimized:
    """Make one optimizer step for each mini-batch; `policy.forking` says by whose entropies.

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
        scored = [score_first(policy, table) for table in minibatches]
    if policy.reference is not None and (policy.needs_reference or _compares(policy, step)):
        with clock.measure("reference"), policy.reference.in_place():
            scored = [score_again(policy, *pair) for pair in zip(minibatches, scored, strict=True)]
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
    """Select with one threshold for the whole rollout batch, or for each mini-batch by itself."""
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
    """Select by the entropies of the policy as it is; before the first update those are known."""
    if policy.needs_entropies and (done.updates or not scores.has_entropies):
        now = score(policy, table)
        if isinstance(now, str):
            return now
        assert torch.equal(now.rows_N, scores.rows_N), "another packing"
        scores = replace(scores, entropy_N=now.entropy_N, has_entropies=True)
        if not done.updates:
            scores = replace(scores, old_logprobs_N=now.old_logprobs_N, has_logprobs=True)
    _select_from(policy, [table], [scores], done, step)
    return None


def _select_from(
    policy: Policy,
    tables: Sequence[TokenTable],
    scores: Sequence[Scores],
    done: Optimized,
    step: int,
) -> None:
    """Select the tokens of one threshold scope, and note them in `done`."""
    masks, selection = policy.select(tables, scores, step=step)
    done.tables += tables
    done.scores += scores
    done.masks += masks
    done.selections += [selection] if selection is not None else []
    if _compares(policy, step):
        by_reference = [s.reference for s in scores if s.reference is not None]
        done.reference_masks += policy.select(tables, by_reference, step=step)[0]

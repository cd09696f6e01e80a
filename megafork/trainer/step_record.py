"""The record of a step for the controller: its metrics, its entropies, what was skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megafork.algorithms.forking import warn_of_ties
from megafork.config import TrainConfig
from megafork.controller.handle import Batch
from megafork.trainer.critic import Critic
from megafork.trainer.entropy_record import entropy_record
from megafork.trainer.outcome import Optimized
from megafork.trainer.policy import Policy
from megafork.trainer.samples import is_sampled

_COUNTS = {
    "head_rows": "update/head_rows",
    "truncated": "mismatch/truncated_tokens",
    "masked": "mismatch/masked_tokens",
}
"""a name in an update's result, and its metric: the sum over the updates"""


def step_record(
    config: TrainConfig, batch: Batch, done: Optimized, policy: Policy, critic: Critic | None
) -> dict[str, Any]:
    """Return what the controller is told of a step (`finish`), on every rank. Collective.

    metrics, on rank 0; forking_tokens, histogram and responses, of the last two None and none where
    nothing is asked for; skipped: of each mini-batch without an update its number, the reason and
    its groups' prompt indices; is_exhausted: they were the last that the config allows; notes, for
    a person.
    """
    step = batch.step
    is_due = is_sampled(step, every=config.run.samples_every, last=config.training.steps)
    record = entropy_record(
        policy,
        done,
        policy_version=batch.trained_by,
        step=step,
        num_responses=config.run.samples if is_due else 0,
    )
    metrics = record.metrics | _metrics(batch, done, policy, critic)
    warning = warn_of_ties(
        metrics["forking/kept_fraction"],
        metrics["forking/wanted_fraction"],
        metrics["forking/rho"],
    )
    if policy.mesh.rank != 0:
        return {"metrics": {}}
    return {
        "metrics": metrics,
        "forking_tokens": record.forking_tokens,
        "histogram": record.histogram,
        "responses": record.responses,
        "skipped": [
            {
                "number": part.number,
                "reason": part.reason,
                "groups": part.table.group_B.unique().tolist(),
            }
            for part in done.skipped
        ],
        "is_exhausted": policy.guard.is_exhausted,
        "notes": [] if warning is None else [f"warning: {warning}"],
    }


def _metrics(
    batch: Batch, done: Optimized, policy: Policy, critic: Critic | None
) -> dict[str, float]:
    """Return the numbers of the step's updates, on every rank."""
    mesh = policy.mesh
    metrics: dict[str, float] = {}
    if mesh.is_last_stage:
        metrics = update_metrics(done.updates, policy.terms)
        if critic is not None:
            metrics |= critic_metrics(done.values, done.critic_updates)
    metrics = mesh.broadcast_object(metrics, src=mesh.last_stage_rank)
    return metrics | {
        "tokens": batch.table.num_tokens,
        "policy_version": batch.step + 1,
        "update/skipped": len(done.skipped),
        "update/empty": done.num_empty,
    }


def update_metrics(
    updates: Sequence[dict[str, float]], terms: Sequence[str] = ()
) -> dict[str, float]:
    """Return means over the step's optimizer updates; NaN where none was made.

    The objective's metrics (ratio/clip_*_fraction) are means over the rows that have a gradient:
    selected tokens with an advantage that the mismatch correction does not mask. update/head_rows
    counts all rows that the head ran on, mismatch/*_tokens the selected tokens with an advantage
    that the correction changed.
    terms: of the loss beside the policy's, "kl" and "entropy_bonus".
    """
    count = len(updates) or math.nan
    of_objective = [name for name in updates[0] if "/" in name] if updates else []
    total = {name: sum(u[name] for u in updates) for name in (*of_objective, *_COUNTS)}
    gradient_rows = sum(u["gradient_rows"] for u in updates)
    return {
        "loss/policy": sum(u["loss"] for u in updates) / count,
        **{f"loss/{name}": sum(u[name] for u in updates) / count for name in terms},
        **{name: total[name] / max(gradient_rows, 1.0) for name in of_objective},
        **{metric: total[name] for name, metric in _COUNTS.items()},
        "ratio/first_update_max_offset": updates[0]["max_ratio_offset"] if updates else math.nan,
        "grad_norm": sum(u["grad_norm"] for u in updates) / count,
    }


def critic_metrics(
    values: dict[str, float], updates: Sequence[dict[str, float]]
) -> dict[str, float]:
    """Return `values` of the rollout batch (see estimate_advantages) and means over the critic's
    updates.

    value/clip_fraction is of the rows that it learnt.
    """
    count = len(updates) or math.nan
    total = {name: sum(u[name] for u in updates) for name in ("loss", "clipped", "rows")}
    return values | {
        "loss/value": total["loss"] / count,
        "value/clip_fraction": total["clipped"] / (total["rows"] or math.nan),
        "critic/grad_norm": sum(u["grad_norm"] for u in updates) / count,
    }

"""The record of a step: its metrics, its entropies, what was skipped."""

from __future__ import annotations

from typing import Any

from megafork.algorithms.forking import warn_of_ties
from megafork.config import TrainConfig
from megafork.controller.handle import Batch
from megafork.trainer import telemetry
from megafork.trainer.critic import Critic
from megafork.trainer.histogram import entropy_histogram
from megafork.trainer.outcome import Optimized
from megafork.trainer.policy import Policy
from megafork.trainer.samples import is_sampled, sampled_responses
from megafork.trainer.token_report import token_report


def step_record(
    config: TrainConfig, batch: Batch, done: Optimized, policy: Policy, critic: Critic | None
) -> dict[str, Any]:
    """Return what the controller is told of a step (`finish`), on every rank. Collective.

    metrics, on rank 0; forking_tokens, histogram and responses, of the last two None and none where
    nothing is asked for; skipped: of each mini-batch without an update its number, the reason and
    its groups' prompt indices; is_exhausted: they were the last that the config allows; notes, for
    a person.
    """
    mesh, step = policy.mesh, batch.step
    responses: list[dict[str, Any]] = []
    report = token_report(done, config.forking, mesh)
    histogram = entropy_histogram(done, mesh)
    if is_sampled(step, every=config.run.samples_every, last=config.training.steps):
        responses = sampled_responses(done, config.run.samples, config.forking, mesh, step=step)
    metrics = _metrics(config, batch, done, policy, critic)
    warning = warn_of_ties(
        metrics["forking/kept_fraction"],
        metrics["forking/wanted_fraction"],
        metrics["forking/rho"],
    )
    if mesh.rank != 0:
        return {"metrics": {}}
    return {
        "metrics": metrics,
        "forking_tokens": report,
        "histogram": histogram,
        "responses": responses,
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
    config: TrainConfig, batch: Batch, done: Optimized, policy: Policy, critic: Critic | None
) -> dict[str, float]:
    """Return the step's numbers but for those of its rollout, on every rank."""
    mesh = policy.mesh
    metrics: dict[str, float] = {}
    if mesh.is_last_stage:
        metrics = telemetry.token_metrics(
            done.tables,
            done.scores,
            done.masks,
            done.selections,
            policy_version=batch.trained_by,
            large_difference=config.mismatch.large_difference,
            mesh=mesh,
        ) | telemetry.update_metrics(done.updates, policy.terms)
        metrics |= telemetry.reference_metrics(done, config.kl.tokens, mesh)
        if critic is not None:
            metrics |= telemetry.critic_metrics(done.values, done.critic_updates)
    metrics = mesh.broadcast_object(metrics, src=mesh.last_stage_rank)
    return metrics | {
        "tokens": batch.table.num_tokens,
        "policy_version": batch.step + 1,
        "update/skipped": len(done.skipped),
        "update/empty": done.num_empty,
    }

"""The numbers of one step, reduced over the ranks that hold the tokens (last pipeline stage)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.forking import Selection
from megafork.algorithms.losses import k3_divergence
from megafork.model.scorer import Scores
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.parallel.topology import Topology
from megafork.rollout.collector import RolloutBatch
from megafork.types import TokenTable

_PERCENTILES = {"entropy/p50": 0.5, "entropy/p80": 0.2, "entropy/p95": 0.05}
_MEANS = (
    "entropy/mean",
    "forking/mean_entropy_inside",
    "forking/mean_entropy_outside",
    "mismatch/kl",
    "mismatch/mean_difference",
)
_OF_SELECTION = (
    "entropy/threshold",
    "forking/kept_fraction",
    "forking/wanted_fraction",
    "forking/boundary_fraction",
)


def token_metrics(
    tables: Sequence[TokenTable],
    scores: Sequence[Scores],
    masks: Sequence[Tensor],
    selections: Sequence[Selection],
    *,
    policy_version: int,
    topology: Topology,
) -> dict[str, float]:
    """Entropy, selection and mismatch of a rollout batch. Last stage only, all its ranks together.

    Percentiles are exact: entropy/p80 is the k-th largest entropy of the loss tokens with
    k = ceil(0.2 N). mismatch/kl is the k3 estimate of KL(engine || trainer) over the tokens that
    the current policy version sampled. Without a table (all were skipped) every value is NaN.
    """
    if not tables:
        return dict.fromkeys((*_MEANS, *_PERCENTILES, *_OF_SELECTION), math.nan)
    columns = [
        (t.loss_mask_R[s.rows_N], t.rollout_logprob_R[s.rows_N], t.policy_version_R[s.rows_N])
        for t, s in zip(tables, scores, strict=True)
    ]
    in_loss, rollout_logprobs, versions = (torch.cat(c) for c in zip(*columns, strict=True))
    entropy = torch.cat([s.entropy_N for s in scores])
    old_logprobs = torch.cat([s.old_logprobs_N for s in scores])
    inside = torch.cat(list(masks))
    outside = in_loss & ~inside
    fresh = versions == policy_version
    k3 = k3_divergence(old_logprobs, rollout_logprobs)
    difference = (old_logprobs - rollout_logprobs).abs()
    group = topology.groups.dp_cp

    def total(values: Tensor, mask: Tensor) -> Tensor:
        return torch.stack([torch.where(mask, values, 0.0).double().sum(), mask.double().sum()])

    pairs = (
        (entropy, in_loss), (entropy, inside), (entropy, outside), (k3, fresh), (difference, fresh)
    )  # fmt: skip
    sums = torch.stack([total(*pair) for pair in pairs]).to(topology.device)
    dist.all_reduce(sums, group=group)
    metrics = {
        name: (value / count if count else math.nan)  # a mean of nothing is written as null
        for name, (value, count) in zip(_MEANS, sums.tolist(), strict=True)
    }
    for name, fraction in _PERCENTILES.items():
        metrics[name] = float(
            top_fraction_threshold(
                entropy.to(topology.device), in_loss.to(topology.device), fraction, groups=(group,)
            ).threshold
        )
    return metrics | _selection_metrics(selections)


def _selection_metrics(selections: Sequence[Selection]) -> dict[str, float]:
    num_total = max(sum(s.num_total for s in selections), 1)
    values = (
        sum(s.threshold for s in selections) / len(selections),
        sum(s.num_kept for s in selections) / num_total,
        sum(s.num_wanted for s in selections) / num_total,
        sum(s.num_boundary for s in selections) / num_total,
    )
    return dict(zip(_OF_SELECTION, values, strict=True))


def update_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the step's optimizer updates; NaN where none was made.

    ratio/clip_*_fraction are of the selected tokens with an advantage, which are also the rows
    that the head ran on (update/head_rows).
    """
    count = len(updates) or math.nan
    head_rows = sum(u["head_rows"] for u in updates)
    return {
        "loss/policy": sum(u["loss"] for u in updates) / count,
        "ratio/clip_low_fraction": sum(u["clip_low"] for u in updates) / max(head_rows, 1.0),
        "ratio/clip_high_fraction": sum(u["clip_high"] for u in updates) / max(head_rows, 1.0),
        "update/head_rows": head_rows,
        "ratio/first_update_max_offset": updates[0]["max_ratio_offset"] if updates else math.nan,
        "grad_norm": sum(u["grad_norm"] for u in updates) / count,
    }


def rollout_metrics(batch: RolloutBatch, policy_version: int) -> dict[str, float]:
    """Of everything generated for the step, dropped groups included.

    sampling/stale_fraction: groups of the batch that an older policy version sampled.
    reward/nonfinite: rewards that are no finite number and take no part in reward/mean.
    """
    # Groups carried over from the last step can fill a batch alone.
    samples = [s for group in batch.generated or batch.groups for s in group.samples]
    n = len(samples)
    rewards = [s.reward for s in samples if math.isfinite(s.reward)]
    stale = sum(group.policy_version != policy_version for group in batch.groups)
    return {
        "sampling/groups_dropped": batch.num_dropped,
        "sampling/stale_fraction": stale / len(batch.groups),
        "reward/mean": sum(rewards) / (len(rewards) or math.nan),
        "reward/nonfinite": n - len(rewards),
        "reward/accuracy": sum(s.accuracy for s in samples) / n,
        "response/length_mean": sum(len(s.token_ids) for s in samples) / n,
        "response/truncated_fraction": sum(s.truncated for s in samples) / n,
    }

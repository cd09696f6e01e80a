"""The numbers of one step, reduced over the ranks that hold the tokens (last pipeline stage)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.forking import Selection
from megafork.algorithms.surrogates import k3_divergence
from megafork.data.token_table import TokenTable
from megafork.model.scorer import Scores
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.parallel.mesh import Mesh
from megafork.trainer.outcome import Optimized

_PERCENTILES = {"entropy/p50": 0.5, "entropy/p80": 0.2, "entropy/p95": 0.05}
_MEANS = (
    "entropy/mean",
    "forking/mean_entropy_inside",
    "forking/mean_entropy_outside",
    "mismatch/kl",
    "mismatch/k1",
    "mismatch/mean_difference",
    "mismatch/large_fraction",
    "lag/kl",
)
_COUNTS = {
    "head_rows": "update/head_rows",
    "truncated": "mismatch/truncated_tokens",
    "masked": "mismatch/masked_tokens",
}
_LARGEST = "mismatch/max_difference"
_OF_SELECTION = (
    "forking/rho",
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
    large_difference: float,
    mesh: Mesh,
) -> dict[str, float]:
    """Entropy, selection and mismatch of a rollout batch. Last stage only, all its ranks together.

    Percentiles are exact: entropy/p80 is the k-th largest entropy of the loss tokens with
    k = ceil(0.2 N). mismatch/* are over the tokens that the current policy version sampled: kl and
    k1 are the k3 and k1 estimates of KL(engine || trainer), the differences absolute ones of
    log-probabilities, and large_fraction is of the tokens where they exceed `large_difference`.
    lag/kl is mismatch/kl's estimate over the tokens of older versions: engine and lag together.
    Without a table (all were skipped) every value is NaN. With old_logprobs = "engine" entropies
    may be unknown, and NaN; and mini-batches that the policy before the first update has not scored
    take no part in mismatch/* and lag/kl.
    """
    if not tables:
        return dict.fromkeys((*_MEANS, _LARGEST, *_PERCENTILES, *_OF_SELECTION), math.nan)
    columns = [
        (t.loss_mask_R[s.rows_N], t.rollout_logprob_R[s.rows_N], t.policy_version_R[s.rows_N])
        for t, s in zip(tables, scores, strict=True)
    ]
    in_loss, rollout_logprobs, versions = (torch.cat(c) for c in zip(*columns, strict=True))
    entropy = torch.cat([s.entropy_N for s in scores])
    old_logprobs = torch.cat([s.old_logprobs_N for s in scores])
    inside = torch.cat(list(masks))
    has_entropies = all(s.has_entropies for s in scores)
    measured = in_loss & has_entropies
    known = _known(scores)
    fresh = known & (versions == policy_version)
    k1 = rollout_logprobs - old_logprobs
    difference = k1.abs()
    pairs = (
        (entropy, measured),
        (entropy, measured & inside),
        (entropy, measured & ~inside),
        (k3_divergence(old_logprobs, rollout_logprobs), fresh),
        (k1, fresh),
        (difference, fresh),
        (difference > large_difference, fresh),
        (k3_divergence(old_logprobs, rollout_logprobs), known & ~fresh),
    )
    metrics = dict(zip(_MEANS, _means(pairs, mesh), strict=True))
    metrics[_LARGEST] = _largest(difference[fresh], mesh)
    if has_entropies:
        metrics |= _percentiles(entropy, in_loss, mesh)
    else:
        metrics |= dict.fromkeys(_PERCENTILES, math.nan)
    return metrics | _selection_metrics(selections)


def _percentiles(entropy: Tensor, in_loss: Tensor, mesh: Mesh) -> dict[str, float]:
    device, groups = mesh.device, (mesh.groups.dp_cp,)
    values, mask = entropy.to(device), in_loss.to(device)
    return {
        name: float(top_fraction_threshold(values, mask, fraction, groups=groups).threshold)
        for name, fraction in _PERCENTILES.items()
    }


def reference_metrics(done: Optimized, kl_tokens: str, mesh: Mesh) -> dict[str, float]:
    """Return the reference policy's metrics of a rollout batch; none where it has not scored it.

    kl/reference: mean k3 estimate of KL(pi_old || ref), whatever kl.estimator is, over the tokens
    of kl_tokens, where pi_old was asked. forking/overlap_initial: the share of the selected tokens
    that the reference's entropies select too, by the same rule among the same tokens; the reference
    is the initial policy unless kl.reference names another (arXiv 2506.01939 reports 86% after
    training). Last stage only, all its ranks together.
    """
    scored = [s.reference for s in done.scores if s.reference is not None]
    pairs = {}
    if scored:
        ours, theirs = (
            torch.cat([s.old_logprobs_N for s in scores]) for scores in (done.scores, scored)
        )
        in_loss = [t.loss_mask_R[s.rows_N] for t, s in zip(done.tables, scored, strict=True)]
        reach = torch.cat(in_loss if kl_tokens == "all" else done.masks) & _known(done.scores)
        pairs["kl/reference"] = (k3_divergence(theirs, ours), reach)
    if done.reference_masks:
        pairs["forking/overlap_initial"] = (torch.cat(done.reference_masks), torch.cat(done.masks))
    return dict(zip(pairs, _means(list(pairs.values()), mesh), strict=True)) if pairs else {}


def _known(scores: Sequence[Scores]) -> Tensor:
    """bool: rows whose old_logprobs are the policy's own."""
    return torch.cat([torch.full((len(s.rows_N),), s.has_logprobs) for s in scores])


def _means(pairs: Sequence[tuple[Tensor, Tensor]], mesh: Mesh) -> list[float]:
    """Return the mean of each (values, mask) over all ranks; of nothing NaN, written as null."""
    sums = [
        torch.stack([torch.where(mask, values, 0.0).double().sum(), mask.double().sum()])
        for values, mask in pairs
    ]
    totals = torch.stack(sums).to(mesh.device)
    dist.all_reduce(totals, group=mesh.groups.dp_cp)
    return [value / count if count else math.nan for value, count in totals.tolist()]


def _largest(values: Tensor, mesh: Mesh) -> float:
    """Return the largest of absolute values over all ranks, some of which may have none."""
    largest = torch.cat([values, values.new_tensor([-1.0])]).max().to(mesh.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.groups.dp_cp)
    return float(largest) if largest >= 0 else math.nan


def _selection_metrics(selections: Sequence[Selection]) -> dict[str, float]:
    num_total = max(sum(s.num_total for s in selections), 1)
    values = (
        selections[0].rho,
        sum(s.threshold for s in selections) / len(selections),
        sum(s.num_kept for s in selections) / num_total,
        sum(s.num_wanted for s in selections) / num_total,
        sum(s.num_boundary for s in selections) / num_total,
    )
    return dict(zip(_OF_SELECTION, values, strict=True))


def update_metrics(
    updates: Sequence[dict[str, float]], terms: Sequence[str] = ()
) -> dict[str, float]:
    """Means over the step's optimizer updates; NaN where none was made.

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
    """`values` of the rollout batch (see estimate_advantages) and means over the critic's updates.

    value/clip_fraction is of the rows that it learnt.
    """
    count = len(updates) or math.nan
    total = {name: sum(u[name] for u in updates) for name in ("loss", "clipped", "rows")}
    return values | {
        "loss/value": total["loss"] / count,
        "value/clip_fraction": total["clipped"] / (total["rows"] or math.nan),
        "critic/grad_norm": sum(u["grad_norm"] for u in updates) / count,
    }

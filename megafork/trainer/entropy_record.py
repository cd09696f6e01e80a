"""The record of a step's entropies, made of its tokens on all ranks by one set of reductions.

Entropies, log-probabilities and masks stay on the ranks that hold the tokens (last pipeline stage).
One maximum, one sum of integers and one of float64 numbers over these ranks give the metrics, the
histogram, the table of tokens that fork (the paper's word clouds, arXiv 2506.01939, figure 2, at
every step) and the sampled responses; the exact percentiles take a radix selection each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.forking import Selection
from megafork.algorithms.surrogates import k3_divergence
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.parallel.mesh import Mesh
from megafork.trainer.outcome import Optimized
from megafork.trainer.policy import Policy
from megafork.trainer.samples import pick_responses, response_columns, response_row

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
_LARGEST = "mismatch/max_difference"
_OF_SELECTION = (
    "forking/rho",
    "entropy/threshold",
    "forking/kept_fraction",
    "forking/wanted_fraction",
    "forking/boundary_fraction",
)
_BINS_PER_DECADE = 20
_DECADES = (-5, 1.3)
"""10^1.3 = 20 nats is more than a vocabulary of 10^8 tokens can have."""
EDGES = (
    0.0,
    *(
        float(f"{10 ** (_DECADES[0] + i / _BINS_PER_DECADE):.6g}")
        for i in range(round((_DECADES[1] - _DECADES[0]) * _BINS_PER_DECADE) + 1)
    ),
)
"""In nats: [0, 1e-5) is the bin of what is certain, then 20 bins a decade, each with its lower edge
and without its upper one; the last takes what lies above too."""
_NUM_BINS = len(EDGES) - 1
_UNIT = float(1 << 32)
"""Entropies are added up as integers of 2^-32 nats: in any order, on any ranks, the same sum. Up to
10^8 tokens of 16 nats fit."""


@dataclass(frozen=True)
class EntropyRecord:
    """A step's metrics and its rows of three files."""

    metrics: dict[str, float]
    forking_tokens: dict[str, Any] | None = None
    """the lists of `most_forking`, without their step"""
    histogram: dict[str, Any] | None = None
    """edges in nats; the loss tokens in each bin, and the selected ones among them"""
    responses: list[dict[str, Any]] = field(default_factory=list)
    """rows of samples.jsonl without their text (see response_row)"""


@dataclass(frozen=True)
class TokenCounts:
    """The counts of each token id in the loss mask of a rollout batch, over all ranks (U ids)."""

    id_U: Tensor
    """int64, ascending"""
    count_U: Tensor
    """int64, in the loss mask"""
    selected_U: Tensor
    """int64, in the forking mask"""
    entropy_U: Tensor
    """float64, nats: the mean over the loss mask"""


@dataclass(frozen=True)
class _Tokens:
    """The step's tokens that this rank holds, mini-batch after mini-batch (N rows)."""

    id_N: Tensor
    in_loss_N: Tensor
    selected_N: Tensor
    entropy_N: Tensor
    old_logprob_N: Tensor
    is_known_N: Tensor
    """bool: whether old_logprob_N is the policy's own, and not the engine's"""
    rollout_logprob_N: Tensor
    policy_version_N: Tensor


def entropy_record(
    policy: Policy, done: Optimized, *, policy_version: int, step: int, num_responses: int = 0
) -> EntropyRecord:
    """Return the step's record on every rank. Collective.

    policy_version: the one that fresh tokens were sampled by (see `_means_of`). The entropies are
    those that the tokens were selected by. Where these are unknown (old_logprobs = "engine") their
    metrics are NaN and there is neither histogram nor table, which forking.report_tokens = 0 turns
    off too. Where every mini-batch was skipped before it was scored, all is NaN or none.

    Counts are exact; at another layout the rounding of matrix products may move an entropy over an
    edge.
    """
    if not done.tables:
        names = (*_MEANS, _LARGEST, *_PERCENTILES, *_OF_SELECTION)
        return EntropyRecord(dict.fromkeys(names, math.nan))
    record = None
    if policy.mesh.is_last_stage:
        record = _reduced(policy, done, policy_version, step, num_responses)
    return policy.mesh.broadcast_object(record, src=policy.mesh.last_stage_rank)


def _reduced(
    policy: Policy, done: Optimized, policy_version: int, step: int, num_responses: int
) -> EntropyRecord:
    """Return the record. Last stage only, all its ranks together."""
    mesh, forking, own = policy.mesh, policy.forking, _own_tokens(done)
    has_entropies = all(s.has_entropies for s in done.scores)
    has_table = has_entropies and forking.report_tokens > 0
    means = _means_of(policy, done, own, policy_version)
    difference_N, fresh_N = means["mismatch/mean_difference"]
    picked = pick_responses(done.tables, num_responses, step=step)

    largest, largest_id = _largest([difference_N[fresh_N], own.id_N], mesh)
    bins = _bins(own) if has_entropies else torch.zeros(0, dtype=torch.int64)
    sums = _sums_by_id(own, int(largest_id) + 1) if has_table else bins[:0]
    bins, sums = _summed([bins, sums], mesh)
    totals, *columns = _summed(
        [_sums_and_counts(means.values()), *(response_columns(done, one) for one in picked)], mesh
    )

    metrics = {
        name: value / count if count else math.nan
        for name, (value, count) in zip(means, totals.tolist(), strict=True)
    }
    metrics[_LARGEST] = largest if largest >= 0 else math.nan
    metrics |= _percentiles(own, mesh) if has_entropies else dict.fromkeys(_PERCENTILES, math.nan)
    histogram = table = None
    if has_entropies:
        tokens, selected = bins.tolist()
        histogram = {"edges": list(EDGES), "tokens": tokens, "selected": selected}
    if has_table:
        table = most_forking(
            _token_counts(sums),
            num_listed=forking.report_tokens,
            min_count=forking.report_min_count,
        )
    responses = [
        response_row(done, one, forking, part, step)
        for one, part in zip(picked, columns, strict=True)
    ]
    return EntropyRecord(metrics | _of_selection(done.selections), table, histogram, responses)


def _own_tokens(done: Optimized) -> _Tokens:
    parts = [
        (
            table.token_R[scores.rows_N],
            table.loss_mask_R[scores.rows_N],
            mask_N,
            scores.entropy_N,
            scores.old_logprobs_N,
            torch.full((len(scores.rows_N),), scores.has_logprobs),
            table.rollout_logprob_R[scores.rows_N],
            table.policy_version_R[scores.rows_N],
        )
        for table, scores, mask_N in zip(done.tables, done.scores, done.masks, strict=True)
    ]
    return _Tokens(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _means_of(
    policy: Policy, done: Optimized, own: _Tokens, policy_version: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the values of each mean of the metrics, and the mask of those that count.

    mismatch/* are over the tokens that `policy_version` sampled: kl and k1 are the k3 and k1
    estimates of KL(engine || trainer), the differences absolute ones of log-probabilities, and
    large_fraction is of the tokens where they exceed mismatch.large_difference. lag/kl is
    mismatch/kl's estimate over the tokens of older versions: engine and lag together. Mini-batches
    that the policy before the first update has not scored take no part in either.

    Of the reference policy, where it has scored the batch. kl/reference: the k3 estimate of
    KL(pi_old || ref), whatever kl.estimator is, over the tokens of kl.tokens, where pi_old was
    asked. forking/overlap_initial: the share of the selected tokens that the reference's entropies
    select too, by the same rule among the same tokens; the reference is the initial policy unless
    kl.reference names another (arXiv 2506.01939 reports 86% after training).
    """
    measured_N = own.in_loss_N & all(s.has_entropies for s in done.scores)
    fresh_N = own.is_known_N & (own.policy_version_N == policy_version)
    k1_N = own.rollout_logprob_N - own.old_logprob_N
    k3_N = k3_divergence(own.old_logprob_N, own.rollout_logprob_N)
    pairs = (
        (own.entropy_N, measured_N),
        (own.entropy_N, measured_N & own.selected_N),
        (own.entropy_N, measured_N & ~own.selected_N),
        (k3_N, fresh_N),
        (k1_N, fresh_N),
        (k1_N.abs(), fresh_N),
        (k1_N.abs() > policy.mismatch.large_difference, fresh_N),
        (k3_N, own.is_known_N & ~fresh_N),
    )
    means = dict(zip(_MEANS, pairs, strict=True))
    references = [s.reference for s in done.scores if s.reference is not None]
    if references:
        theirs_N = torch.cat([scores.old_logprobs_N for scores in references])
        asked_N = own.in_loss_N if policy.kl.tokens == "all" else own.selected_N
        divergence_N = k3_divergence(theirs_N, own.old_logprob_N)
        means["kl/reference"] = (divergence_N, asked_N & own.is_known_N)
    if done.reference_masks:
        means["forking/overlap_initial"] = (torch.cat(done.reference_masks), own.selected_N)
    return means


def _sums_and_counts(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of each pair's masked values and their number, float64 [pairs, 2]."""
    return torch.stack(
        [
            torch.stack([torch.where(mask, values, 0.0).double().sum(), mask.double().sum()])
            for values, mask in pairs
        ]
    )


def _bins(own: _Tokens) -> Tensor:
    """Return how many loss tokens and selected ones lie in each bin, int64 [2, bins]."""
    bin_N = torch.bucketize(own.entropy_N, torch.tensor(EDGES[1:-1]), right=True)
    chosen = (own.in_loss_N, own.selected_N)
    return torch.stack([torch.bincount(bin_N[c], minlength=_NUM_BINS) for c in chosen])


def _sums_by_id(own: _Tokens, num_ids: int) -> Tensor:
    """Return the loss tokens, the selected ones and the entropies of each id, int64 [3, ids]; the
    entropies in units, over the loss tokens."""
    sums = torch.zeros(3, num_ids, dtype=torch.int64)
    units_N = (own.entropy_N.double() * _UNIT).round().long()
    sums[0] = torch.bincount(own.id_N[own.in_loss_N], minlength=num_ids)
    sums[1] = torch.bincount(own.id_N[own.selected_N], minlength=num_ids)
    sums[2].index_add_(0, own.id_N[own.in_loss_N], units_N[own.in_loss_N])
    return sums


def _summed(parts: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """Return the parts' sums over all ranks, on the CPU, in one all-reduce."""
    flat = torch.cat([part.flatten() for part in parts]).to(mesh.device)
    dist.all_reduce(flat, group=mesh.groups.dp_cp)
    sums = flat.cpu().split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def _largest(parts: Sequence[Tensor], mesh: Mesh) -> list[float]:
    """Return the largest of each part's values, which are not negative, over all ranks; -1 where no
    rank has one."""
    own = [torch.cat([part.double(), torch.tensor([-1.0]).double()]).max() for part in parts]
    largest = torch.stack(own).to(mesh.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.groups.dp_cp)
    return largest.tolist()


def _percentiles(own: _Tokens, mesh: Mesh) -> dict[str, float]:
    """Return exact percentiles: entropy/p80 is the k-th largest entropy of the loss tokens with
    k = ceil(0.2 N)."""
    values, mask = own.entropy_N.to(mesh.device), own.in_loss_N.to(mesh.device)
    groups = (mesh.groups.dp_cp,)
    return {
        name: float(top_fraction_threshold(values, mask, fraction, groups=groups).threshold)
        for name, fraction in _PERCENTILES.items()
    }


def _of_selection(selections: Sequence[Selection]) -> dict[str, float]:
    num_total = max(sum(s.num_total for s in selections), 1)
    values = (
        selections[0].rho,
        sum(s.threshold for s in selections) / len(selections),
        sum(s.num_kept for s in selections) / num_total,
        sum(s.num_wanted for s in selections) / num_total,
        sum(s.num_boundary for s in selections) / num_total,
    )
    return dict(zip(_OF_SELECTION, values, strict=True))


def _token_counts(sums: Tensor) -> TokenCounts:
    """Return the ids that occur, of the sums of `_sums_by_id`."""
    id_U = sums[0].nonzero()[:, 0]
    count_U, selected_U, units_U = sums[:, id_U]
    return TokenCounts(id_U, count_U, selected_U, units_U.double() / _UNIT / count_U)


def most_forking(counts: TokenCounts, *, num_listed: int, min_count: int) -> dict[str, Any]:
    """List the tokens of highest mean entropy among those that occur min_count times, and those
    with the most selected positions; of equal ones the lower id first."""
    frequent = counts.count_U >= min_count
    entropy_U = torch.where(frequent, counts.entropy_U, -torch.inf)
    num_highest = min(num_listed, int(frequent.sum()))
    highest = entropy_U.argsort(descending=True, stable=True)[:num_highest]
    most = counts.selected_U.argsort(descending=True, stable=True)[:num_listed]
    return {
        "tokens": int(counts.count_U.sum()),
        "selected": int(counts.selected_U.sum()),
        "min_count": min_count,
        "highest_entropy": _listed(counts, highest),
        "most_selected": _listed(counts, most[counts.selected_U[most] > 0]),
    }


def _listed(counts: TokenCounts, picked: Tensor) -> list[dict[str, Any]]:
    columns = (counts.id_U, counts.count_U, counts.selected_U, counts.entropy_U)
    names = ("id", "count", "selected", "mean_entropy")
    rows = zip(*(column[picked].tolist() for column in columns), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]

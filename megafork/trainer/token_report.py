"""The table of tokens that fork: how often each token id is selected, and its mean entropy.

The paper's word clouds (arXiv 2506.01939, figure 2), at every step of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.config import ForkingConfig
from megafork.data.token_table import TokenTable
from megafork.model.scorer import Scores
from megafork.parallel.mesh import Mesh
from megafork.trainer.outcome import Optimized

_UNIT = float(1 << 32)
"""Entropies are added up as integers of 2^-32 nats: in any order, on any ranks, the same sum. Up to
10^8 tokens of 16 nats fit."""


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


def token_report(done: Optimized, config: ForkingConfig, mesh: Mesh) -> dict[str, Any] | None:
    """The step's lists (`most_forking`) on every rank, all ranks together.

    None where nothing is asked for, every mini-batch was skipped before it was scored, or no
    entropies are known (old_logprobs = "engine").
    """
    if not config.report_tokens or not all(s.has_entropies for s in done.scores) or not done.tables:
        return None
    report = None
    if mesh.is_last_stage:
        report = most_forking(
            count_tokens(done.tables, done.scores, done.masks, mesh),
            num_listed=config.report_tokens,
            min_count=config.report_min_count,
        )
    return mesh.broadcast_object(report, src=mesh.last_stage_rank)


def count_tokens(
    tables: Sequence[TokenTable],
    scores: Sequence[Scores],
    masks: Sequence[Tensor],
    mesh: Mesh,
) -> TokenCounts:
    """Last stage only, all its ranks together; one all-reduce of 3 V integers, V the largest id."""
    device, group = mesh.device, mesh.groups.dp_cp
    ids = [t.token_R[s.rows_N] for t, s in zip(tables, scores, strict=True)]
    size = torch.tensor(1 + max((int(part.max()) for part in ids if len(part)), default=0))
    size = size.to(device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX, group=group)
    own = torch.zeros(3, int(size), dtype=torch.int64)
    for table, score, mask_N in zip(tables, scores, masks, strict=True):
        token_N, in_loss_N = table.token_R[score.rows_N], table.loss_mask_R[score.rows_N]
        units_N = (score.entropy_N.double() * _UNIT).round().long()
        own[0] += torch.bincount(token_N[in_loss_N], minlength=len(own[0]))
        own[1] += torch.bincount(token_N[mask_N], minlength=len(own[0]))
        own[2].index_add_(0, token_N[in_loss_N], units_N[in_loss_N])
    sums = own.to(device)
    dist.all_reduce(sums, group=group)
    id_U = sums[0].nonzero()[:, 0]
    count_U, selected_U, units_U = sums[:, id_U].cpu()
    id_U = id_U.cpu()
    return TokenCounts(id_U, count_U, selected_U, units_U.double() / _UNIT / count_U)


def most_forking(counts: TokenCounts, *, num_listed: int, min_count: int) -> dict[str, Any]:
    """The tokens of highest mean entropy among those that occur min_count times, and those with the
    most selected positions; of equal ones the lower id first."""
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

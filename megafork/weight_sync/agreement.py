"""Do trainer and rollout server compute the same log-probabilities? If not, stop the run.

A wrong mapping, a stale cache, a truncated sampling distribution or another dtype all show here
and nowhere else: training would go on with wrong ratios.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megafork.algorithms.losses import k3_divergence
from megafork.config import SyncConfig
from megafork.data.prompts import Prompt
from megafork.errors import UserError
from megafork.model.scorer import Scorer
from megafork.parallel.topology import Topology
from megafork.rollout.client import RolloutClient
from megafork.rollout.fleet import Fleet
from megafork.rollout.sampling import Sampling
from megafork.types import Group, Sample, token_table

# Mean |difference| and k3 that rounding alone stays well below (docs/numerics.md).
_BOUNDS = {"float32": (1e-4, 1e-6), "bfloat16": (8e-2, 2e-2)}


@dataclass(frozen=True)
class Agreement:
    mean_difference: float
    max_difference: float
    k3: float
    num_tokens: int


async def probe(
    client: RolloutClient | Fleet, prompts: list[Prompt], sampling: Sampling
) -> list[Group]:
    """One response to each prompt."""
    async with client:
        answers = await asyncio.gather(*(client.generate(p.ids, 1, sampling) for p in prompts))
    return [
        Group(p.index, p.ids, 0, [Sample(i, c.token_ids, c.logprobs, c.truncated)])
        for i, (p, [c]) in enumerate(zip(prompts, answers, strict=True))
    ]


def measure(groups: list[Group], policy: Scorer, topology: Topology) -> Agreement:
    """Compare on the probe's responses. Collective; the result is known to every rank."""
    table = token_table(groups)
    scores = policy.score(table)
    result = None
    if topology.is_last_stage:
        theirs = table.rollout_logprob_R[scores.rows_N]
        difference = (scores.old_logprobs_N - theirs).abs().double()
        k3 = k3_divergence(scores.old_logprobs_N, theirs).double()
        sums = torch.stack([difference.sum(), k3.sum(), torch.tensor(len(theirs)).double()])
        largest = difference.max() if len(difference) else difference.new_zeros(())
        sums, largest = sums.to(topology.device), largest.to(topology.device)
        dist.all_reduce(sums, group=topology.groups.dp_cp)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=topology.groups.dp_cp)
        total, k3_total, count = sums.tolist()
        result = Agreement(total / count, float(largest), k3_total / count, int(count))
    return topology.broadcast_object(result, src=topology.last_stage_rank)


def require(agreement: Agreement, sync: SyncConfig, dtype: str) -> None:
    """Raise UserError when trainer and server disagree by more than rounding."""
    mean_bound, k3_bound = _BOUNDS[dtype]
    mean_bound = sync.max_mean_difference or mean_bound
    k3_bound = sync.max_k3 or k3_bound
    if agreement.mean_difference <= mean_bound and agreement.k3 <= k3_bound:
        return
    raise UserError(
        f"trainer and rollout server disagree after a weight push: mean |log-probability "
        f"difference| {agreement.mean_difference:.2e} (bound {mean_bound:.0e}, sync."
        f"max_mean_difference), k3 {agreement.k3:.2e} (bound {k3_bound:.0e}, sync.max_k3), largest "
        f"{agreement.max_difference:.2e}, over {agreement.num_tokens} tokens. Is rollout.dtype the "
        "policy's, and is the server megafork's own?"
    )

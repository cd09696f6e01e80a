"""Checks that trainer and rollout server compute the same log-probabilities, or stops the run.

A wrong mapping, a stale cache, a truncated sampling distribution, another temperature or another
dtype all show here and nowhere else: training would go on with wrong ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megafork.config import SyncConfig
from megafork.data.sample import Group
from megafork.data.token_table import token_table
from megafork.errors import UserError
from megafork.model.rounding import rounded_and_exact
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import Mesh
from megafork.weights.difference import Difference, Estimate, describe, sums_by_response


@dataclass(frozen=True)
class _Bounds:
    """Bounds that rounding alone stays well below (docs/numerics.md)."""

    absolute: float
    k3: float
    mean: float
    """For the signed mean, less the mean square: an engine that is merely noisy samples tokens by
    its noise, which moves the mean by up to half of the mean square"""
    slope: float
    noise: float = math.inf


BOUNDS = {
    "float32": _Bounds(absolute=1e-4, k3=1e-6, mean=1e-4, slope=1e-3),
    "bfloat16": _Bounds(absolute=8e-2, k3=2e-2, mean=2e-3, slope=1e-2, noise=4.0),
}


@dataclass(frozen=True)
class Agreement:
    difference: Difference
    max_difference: float


def measure(groups: list[Group], policy: Scorer, mesh: Mesh) -> Agreement:
    """Compare on the probe's responses. Collective; the result is known to every rank.

    A bfloat16 policy takes three forward passes: two tell what its rounding costs on these tokens.
    """
    table = token_table(groups)
    scores = policy.score(table)
    is_rounded = policy.dtype != torch.float32
    rounding = rounded_and_exact(policy, table) if is_rounded else None
    result = None
    if mesh.is_last_stage:
        ours_N, theirs_N = scores.old_logprobs_N, table.rollout_logprob_R[scores.rows_N]
        responses_N = table.sample_R[scores.rows_N]
        sums = sums_by_response(ours_N, theirs_N, responses_N, table.num_samples, rounding)
        difference = (ours_N - theirs_N).abs()
        largest = difference.max() if len(difference) else difference.new_zeros(())
        sums, largest = sums.to(mesh.device), largest.double().to(mesh.device)
        dist.all_reduce(sums, group=mesh.groups.dp_cp)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.groups.dp_cp)
        result = Agreement(describe(sums.cpu(), rounded=is_rounded), float(largest))
    return mesh.broadcast_object(result, src=mesh.last_stage_rank)


def require(agreement: Agreement, sync: SyncConfig, dtype: str) -> None:
    """Raise UserError when trainer and server disagree by more than rounding."""
    complaints = list(_complaints(agreement.difference, sync, BOUNDS[dtype]))
    if complaints:
        raise UserError(
            f"trainer and rollout server disagree after a weight push: {'; '.join(complaints)}; "
            f"largest difference {agreement.max_difference:.2e}, over "
            f"{agreement.difference.num_tokens} tokens. Is rollout.dtype the policy's, and is the "
            "server megafork's own?"
        )


def _complaints(found: Difference, sync: SyncConfig, bounds: _Bounds) -> Iterator[str]:
    """Yield a message for each bound that is passed, with what that may come from, if known."""
    absolute, k3 = sync.max_mean_difference or bounds.absolute, sync.max_k3 or bounds.k3
    mean, slope = (sync.max_bias or bounds.mean) + found.squared, sync.max_slope or bounds.slope
    noise = sync.max_noise_ratio or bounds.noise
    if not found.absolute <= absolute:
        yield (
            f"mean |log-probability difference| {found.absolute:.2e} (bound {absolute:.0e}, "
            "sync.max_mean_difference)"
        )
    if not found.k3 <= k3:
        yield f"k3 {found.k3:.2e} (bound {k3:.0e}, sync.max_k3)"
    if found.mean.size.is_above(mean):
        yield (
            f"mean difference {_shown(found.mean)} (bound {mean:.1e}, sync.max_bias): as where the "
            "server cuts the distribution (top_p, top_k, min_p)"
        )
    if found.slope.size.is_above(slope):
        yield (
            f"slope of the difference {_shown(found.slope)} (bound {slope:.0e}, sync.max_slope): "
            "as of another temperature or scale of the logits"
        )
    if found.noise is not None and found.noise.is_above(math.log(noise)):
        yield (
            f"the server's mean square error {math.exp(found.noise.value):.1f} times that of "
            f"bfloat16 on these tokens (bound {noise:g}, sync.max_noise_ratio; both against "
            "float32): as of quantised weights, caches or products"
        )


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.2e} (standard error {estimate.error:.0e})"

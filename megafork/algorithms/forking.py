"""Which response tokens carry the policy gradient (arXiv 2506.01939, section 4).

The paper keeps the tokens with entropy at or above tau_rho(B), the threshold of the top fraction
rho of all response tokens of the optimizer batch B. The threshold here is exact over all ranks
(ops/top_fraction.py), whatever the micro-batches and the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.config import ForkingConfig
from megafork.ops.top_fraction import top_fraction_threshold
from megafork.types import hash64


@dataclass(frozen=True)
class Selection:
    mask_T: Tensor
    """bool: forking_mask, contained in the loss mask"""
    threshold: float
    """tau in nats: the smallest entropy kept (top), the smallest one not kept (bottom)"""
    num_kept: int
    num_total: int
    num_boundary: int
    """tokens within `boundary_eps` of the threshold: another layout may decide them otherwise"""

    @property
    def kept_fraction(self) -> float:
        return self.num_kept / max(self.num_total, 1)


def select_tokens(
    entropy_T: Tensor,
    loss_mask_T: Tensor,
    key_T2: Tensor,
    config: ForkingConfig,
    *,
    seed: int,
    step: int,
    groups: Sequence[dist.ProcessGroup] = (),
    boundary_eps: float = 0.0,
) -> Selection:
    """Select among the tokens of one threshold scope; call it once for each scope.

    entropy_T: float32 nats; loss_mask_T: bool; key_T2: int64 (sample uid, position); each rank of
    `groups` passes its own tokens. "bottom" is the complement of "top" at the same rho; "random"
    takes the top rho of a hash of (seed, step, key), so the same tokens at every layout.
    """
    by_entropy = config.select in ("top", "bottom")
    values_T = entropy_T
    if config.select == "random":
        values_T = random_scores(key_T2, seed=seed, step=step)
    top = top_fraction_threshold(values_T, loss_mask_T, config.rho, groups=groups)
    threshold, num_top, num_total = float(top.threshold), int(top.num_kept), int(top.num_total)
    top_T = loss_mask_T & (values_T >= threshold)
    boundary = (loss_mask_T & ((values_T - threshold).abs() <= boundary_eps)).sum()
    mask_T = {"bottom": loss_mask_T & ~top_T, "all": loss_mask_T}.get(config.select, top_T)
    for group in groups:
        dist.all_reduce(boundary, group=group)
    return Selection(
        mask_T=mask_T,
        threshold=threshold,
        num_kept={"bottom": num_total - num_top, "all": num_total}.get(config.select, num_top),
        num_total=num_total,
        # One token is always at the threshold; only company makes it a matter of rounding.
        num_boundary=int(boundary) if by_entropy and boundary > 1 else 0,
    )


def warn_of_ties(kept_fraction: float, config: ForkingConfig) -> str | None:
    """A message when ties move the kept fraction by more than a tenth of rho; else None.

    A collapsed policy has many entropies of 0; when they reach the threshold all are kept.
    """
    if config.select == "all":
        return None
    expected = 1.0 - config.rho if config.select == "bottom" else config.rho
    if abs(kept_fraction - expected) <= 0.1 * config.rho:
        return None
    return (
        f"forking.select={config.select} kept {kept_fraction:.1%} of the tokens where "
        f"forking.rho={config.rho:g} asks for {expected:.1%}: many entropies are equal"
    )


def random_scores(key_T2: Tensor, *, seed: int, step: int) -> Tensor:
    """float32 in [0, 1), a function of (seed, step, key) alone."""
    hashed_T = hash64(torch.tensor(seed), torch.tensor(step), key_T2[:, 0], key_T2[:, 1])
    return ((hashed_T >> 40) & 0xFFFFFF).float() / float(1 << 24)

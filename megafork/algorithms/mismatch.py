"""Correction of the mismatch between the engine that sampled and the trainer that learns.

Tokens are drawn from pi_engine (the server's kernels and dtype, and for groups that were carried
over an older policy version), while the surrogates take them as drawn from pi_old. Importance
weights pi_old / pi_engine make up for it: truncated (TIS, Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training") or masked (MIS, as IcePop's,
arXiv 2510.18855).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megafork.config import MismatchConfig


@dataclass(frozen=True)
class ImportanceWeights:
    weight_T: Tensor
    """float32: the constant that a token's surrogate is multiplied by"""
    truncated_T: Tensor
    """bool: the ratio was above max_weight and is now max_weight"""
    masked_T: Tensor
    """bool: the ratio was outside min_weight .. max_weight and the weight is 0"""


def importance_weights(
    old_logprobs_T: Tensor,
    rollout_logprobs_T: Tensor,
    loss_mask_T: Tensor,
    sequence_T: Tensor,
    config: MismatchConfig,
    *,
    num_sequences: int,
    cp_group: dist.ProcessGroup | None = None,
) -> ImportanceWeights:
    """Return the weight of each token; equal policies give exactly 1.

    Log-probabilities are float32 [T]; loss_mask_T: bool; sequence_T: int64, which of num_sequences
    sequences a token is of. At level "sequence" all tokens of a response share the product of
    their ratios; cp_group: the ranks that share each sequence.
    """
    log_ratio_T = old_logprobs_T - rollout_logprobs_T
    if config.level == "sequence":
        kept_T = torch.where(loss_mask_T, log_ratio_T, 0.0)
        log_ratio_T = sums_of_sequences(kept_T, sequence_T, num_sequences, cp_group)[sequence_T]
    ratio_T = log_ratio_T.exp().float()
    never_T = torch.zeros_like(loss_mask_T)
    if config.correction == "none":
        return ImportanceWeights(torch.ones_like(ratio_T), never_T, never_T)
    above_T = ratio_T > config.max_weight
    if config.correction == "truncate":
        return ImportanceWeights(ratio_T.clamp(max=config.max_weight), above_T, never_T)
    smallest = 1 / config.max_weight if config.min_weight is None else config.min_weight
    masked_T = above_T | (ratio_T < smallest)
    return ImportanceWeights(ratio_T.masked_fill(masked_T, 0.0), never_T, masked_T)


def sums_of_sequences(
    values_T: Tensor,
    sequence_T: Tensor,
    num_sequences: int,
    cp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Return each sequence's sum of values over the ranks that share it, float64 [num_sequences].

    No gradient goes through it.
    """
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=values_T.device)
    sums.index_add_(0, sequence_T, values_T.detach().double())
    if cp_group is not None:
        dist.all_reduce(sums, group=cp_group)
    return sums

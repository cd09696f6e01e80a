"""The clipped surrogate of PPO, GRPO and DAPO on masked tokens, with a named denominator."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    mask_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    num_tokens: int,
) -> Tensor:
    """-1/num_tokens sum over mask of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    r = exp(logprobs - old_logprobs). All inputs are [T], float32 (mask: bool). `num_tokens` counts
    the loss tokens of the whole optimizer mini-batch, selected or not, over all ranks: losses of
    micro-batches and ranks add up (arXiv 2506.01939, eq. 5; token-mean as in DAPO). Differentiable
    in logprobs_T; with an empty mask the result is a connected zero.
    """
    # Masked before the exponential: an unselected token's overflow would be a NaN in the gradient.
    ratio_T = torch.where(mask_T, logprobs_T - old_logprobs_T, 0.0).exp()
    unclipped_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T
    objective_T = torch.minimum(unclipped_T, clipped_T)
    return -torch.where(mask_T, objective_T, 0.0).sum() / max(num_tokens, 1)


def rows_with_gradient(advantages_T: Tensor, mask_T: Tensor) -> Tensor:
    """bool [T]: the tokens whose log-probability clipped_policy_loss has a gradient in.

    The head need not run on any other, forward or backward.
    """
    return mask_T & (advantages_T != 0)


def clip_counts(
    ratio_T: Tensor, advantages_T: Tensor, mask_T: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """How many masked tokens the clip cuts off, (below 1 - clip_low, above 1 + clip_high).

    A token counts only when the clip decides the minimum: below for a negative advantage, above
    for a positive one.
    """
    low = mask_T & (ratio_T < 1.0 - clip_low) & (advantages_T < 0)
    high = mask_T & (ratio_T > 1.0 + clip_high) & (advantages_T > 0)
    return low.sum(), high.sum()


def policy_ratio(logprobs_T: Tensor, old_logprobs_T: Tensor) -> Tensor:
    """pi_theta / pi_old of each token."""
    return (logprobs_T - old_logprobs_T).exp()


def k3_divergence(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    """k3 estimate of KL(other || this) at tokens sampled from `other`.

    r - 1 - log r with r = this / other: never negative, zero where they agree (Schulman,
    "Approximating KL divergence").
    """
    log_ratio_T = logprobs_T - other_logprobs_T
    return log_ratio_T.expm1() - log_ratio_T

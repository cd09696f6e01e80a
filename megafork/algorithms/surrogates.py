"""The clipped surrogates, the ratios that they clip, and the k3 estimate of a KL divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    num_tokens: int,
    clip_dual: float | None = None,
) -> Tensor:
    """Return the clipped surrogate loss (PPO, GRPO, DAPO) over the masked tokens, a scalar.

    It is -1/num_tokens times the sum of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with
    r = exp(logprobs - old_logprobs); with clip_dual no term falls below clip_dual A (arXiv
    1912.09729). All tensors have one shape, or shapes that broadcast to it (advantages of whole
    responses: [B, 1]). mask: nonzero where a token carries the gradient, as `forking_mask` says;
    what stands elsewhere may be anything, also NaN. `num_tokens` counts the loss tokens of the
    whole optimizer batch, selected or not, so losses of micro-batches and ranks add up (where
    gradients are averaged over ranks, multiply by their number). Differentiable in logprobs; 0 for
    an empty mask.
    Source: arXiv 2503.14476, equation 8; arXiv 2506.01939, equation 5.
    """
    mask = mask.bool()
    ratio = token_ratio(logprobs, old_logprobs, mask)
    terms = clipped_surrogate(
        ratio, advantages, clip_low=clip_low, clip_high=clip_high, clip_dual=clip_dual
    )
    return -torch.where(mask, terms, 0.0).sum() / num_tokens


def clipped_surrogate(
    ratio_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = None,
) -> Tensor:
    """Return min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); if A < 0, at least clip_dual A.

    The dual clip is that of arXiv 1912.09729. Written by the sign of A, so that an infinite ratio
    is multiplied by no advantage but a negative one that nothing bounds.
    """
    bounded_T = torch.where(
        advantages_T < 0,
        ratio_T.clamp(min=1.0 - clip_low, max=clip_dual),
        ratio_T.clamp(max=1.0 + clip_high),
    )
    return bounded_T * advantages_T


def clipped_weight_surrogate(
    ratio_T: Tensor,
    logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Return CISPO's surrogate: the clipped ratio is constant, so a clipped token has a gradient.

    Source: arXiv 2506.13585, which sets no lower bound: clip_low = 1.
    """
    weight_T = ratio_T.detach().clamp(1.0 - clip_low, 1.0 + clip_high)
    return weight_T * advantages_T * logprobs_T


def token_ratio(logprobs_T: Tensor, old_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """Return pi_theta / pi_old, [T]; 1 and without a gradient outside the mask."""
    log_ratio_T = torch.where(mask_T, logprobs_T.detach() - old_logprobs_T, 0.0)
    return Ratio.apply(logprobs_T, log_ratio_T.exp(), mask_T)


class Ratio(torch.autograd.Function):
    """A ratio as a function of the token's own log-probability: d ratio = ratio d logprob.

    A token that the clip has decided passes 0 back, and 0 stays 0 where the ratio is infinite.
    """

    @staticmethod
    def forward(ctx: Any, logprobs_T: Tensor, ratio_T: Tensor, mask_T: Tensor) -> Tensor:
        ctx.save_for_backward(ratio_T, mask_T)
        return ratio_T.clone()

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ratio_T, mask_T = ctx.saved_tensors
        return torch.where(mask_T & (grad_T != 0), grad_T * ratio_T, 0.0), None, None


def k3_divergence(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    """Return the k3 estimate of KL(other || this) at tokens sampled from `other`.

    r - 1 - log r with r = this / other: never negative, zero where they agree (Schulman,
    "Approximating KL divergence"). Value and gradient are right to the dtype's last digits however
    small log r is: it is x^2/2 then, which the difference would lose.
    """
    log_ratio_T = logprobs_T - other_logprobs_T
    x_T = log_ratio_T.double()
    series_T = x_T.square() * (0.5 + x_T * (1 / 6 + x_T / 24))
    divergence_T = torch.where(x_T.abs() < 1e-4, series_T, x_T.expm1() - x_T)
    return divergence_T.to(log_ratio_T.dtype)

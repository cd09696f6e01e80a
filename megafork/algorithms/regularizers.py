"""Terms beside the policy's: the KL to a reference policy and the entropy bonus.

Both are sums over the tokens of their reach over the policy loss's own denominator. Neither has the
mismatch weight: a token whose policy gradient the correction masks still has them (so in TRL).

What the KL's estimators are worth as losses differs from what they are worth as values. With
x = log pi - log ref at tokens drawn from pi (Schulman, "Approximating KL divergence";
arXiv 2506.09477, 2510.01555):

    k1 = x               mean KL(pi || ref); its gradient, grad log pi, has the mean 0
    k2 = x^2 / 2         biased; its gradient, x grad log pi, has the mean grad KL(pi || ref)
    k3 = exp(-x) - 1 + x mean KL(pi || ref); its gradient, (1 - exp(-x)) grad log pi, has the mean
                         grad KL(ref || pi), the other direction, equal to first order in x

So k1 is no loss: as one it would add noise and nothing else. Here it has its value and the gradient
x grad log pi, which is k2's, and what the policy gradient makes of k1 taken from the token's own
reward.

"Drawn from pi" holds at a batch's first update. With r = pi / pi_old as a factor (kl.ratio,
arXiv 2512.02556) the value has the mean of KL(pi || ref) (k2: its own) at later ones too, and the
gradient is r x grad log pi, of mean grad KL(pi || ref), with every estimator: that of r k3 is so by
itself, for k1 and k2 r is a constant. It is not clipped. Responses of an older policy version are
taken as pi_old's. A token's term knows of no later token: these are the gradients of the tokens'
divergences at given prefixes, not of the sequence's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megafork.algorithms.losses import LossRows
from megafork.algorithms.surrogates import k3_divergence, token_ratio

if TYPE_CHECKING:
    from megafork.config import EntropyBonusConfig, KLConfig


def kl_loss(logprobs_N: Tensor, rows: LossRows, config: KLConfig, *, denominator: int) -> Tensor:
    """Return coefficient / denominator times the weighted sum of the estimates.

    logprobs_N: float32, of the rows of `rows`; differentiable where rows.kl_weight_N is not 0, a
    connected zero without such a row. denominator: as in `losses.policy_loss`.
    """
    reach_N = rows.kl_weight_N > 0
    # Outside 0, not merely weighted by it: an infinity would be a NaN in the gradient.
    log_ratio_N = torch.where(reach_N, logprobs_N - rows.ref_logprobs_N, 0.0)
    terms_N = kl_estimate(log_ratio_N, config.estimator)
    if config.ratio:
        ratio_N = token_ratio(logprobs_N, rows.old_logprobs_N, reach_N)
        terms_N = terms_N * (ratio_N if config.estimator == "k3" else ratio_N.detach())
    return config.coefficient * (terms_N * rows.kl_weight_N).sum() / denominator


def kl_estimate(log_ratio_T: Tensor, estimator: str) -> Tensor:
    """Return the estimate of KL(pi || ref) from log pi - log ref, with the module's gradients."""
    if estimator == "k3":
        return k3_divergence(-log_ratio_T, torch.zeros_like(log_ratio_T))
    k2_T = log_ratio_T.square() / 2
    return log_ratio_T.detach() + (k2_T - k2_T.detach()) if estimator == "k1" else k2_T


def entropy_loss(
    entropy_N: Tensor, rows: LossRows, config: EntropyBonusConfig, *, denominator: int
) -> Tensor:
    """Return -coefficient / denominator times the weighted sum of the entropies (nats).

    Differentiable in entropy_N. The entropies are those that tokens are selected by: at
    forking.entropy_temperature.
    """
    terms_N = torch.where(rows.entropy_weight_N > 0, entropy_N, 0.0) * rows.entropy_weight_N
    return -config.coefficient * terms_N.sum() / denominator

"""The policy losses: one clipped surrogate with a token's or its sequence's ratio, and CISPO.

    ppo     min(r A, clip(r) A), r the token's ratio (GRPO, arXiv 2402.03300; DAPO, 2503.14476)
    gspo    the same with the sequence's, the geometric mean of its tokens' (arXiv 2507.18071)
    cispo   sg[clip(r)] A log pi, sg: a constant (arXiv 2506.13585)

The forking mask says which tokens carry a gradient; it changes no denominator and no ratio. For
ppo and cispo the other tokens have no term (arXiv 2506.01939, eq. 5). For gspo they have none
either, but the sequence's ratio stays that of the whole response, selected or not: the loss is that
of GSPO-token (section 4.3 there), whose gradient sums s_i A grad log pi over the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.mismatch import importance_weights, sums_of_sequences
from megafork.types import TokenTable

if TYPE_CHECKING:
    from megafork.config import AlgorithmConfig, EntropyBonusConfig, KLConfig, MismatchConfig


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


@dataclass(frozen=True)
class LossRows:
    """What the loss knows of N tokens besides their log-probability."""

    old_logprobs_N: Tensor
    advantages_N: Tensor
    weight_N: Tensor
    """float32, constant: the mismatch correction and the share of `sequence_tokens`"""
    sequence_N: Tensor
    """int64: which sample of the mini-batch"""
    num_tokens_N: Tensor
    """int64: loss tokens of that sample, on all ranks"""
    gradient_N: Tensor
    """bool: the policy's loss has a gradient in the token's log-probability"""
    needed_N: Tensor
    """bool: a term of the loss depends on its value; the head runs on these rows"""
    truncated_N: Tensor
    masked_N: Tensor
    """bool: selected tokens that the mismatch correction truncates, masks"""
    ref_logprobs_N: Tensor
    """the reference policy's; old_logprobs_N where there is none"""
    kl_weight_N: Tensor
    entropy_weight_N: Tensor
    """float32, constant: the share of `sequence_tokens` in the term's reach, 0 outside"""

    def split(self, sizes: list[int]) -> list[LossRows]:
        columns = (getattr(self, field.name).split(sizes) for field in fields(self))
        return [LossRows(*parts) for parts in zip(*columns, strict=True)]

    def only_needed(self) -> LossRows:
        return LossRows(*(getattr(self, field.name)[self.needed_N] for field in fields(self)))


def loss_rows(
    table: TokenTable,
    rows_N: Tensor,
    old_logprobs_N: Tensor,
    mask_N: Tensor,
    algorithm: AlgorithmConfig,
    mismatch: MismatchConfig,
    kl: KLConfig,
    entropy_bonus: EntropyBonusConfig,
    *,
    device: torch.device,
    ref_logprobs_N: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> LossRows:
    """The columns of one rank's rows of a mini-batch, on `device`.

    mask_N: the forking mask. ref_logprobs_N: needed where kl has a coefficient. cp_group: the ranks
    that share each sequence, which all call this together; None: each sequence is whole on its
    rank.
    """
    assert ref_logprobs_N is not None or not kl.coefficient, "the reference has not scored"
    sequence_N = table.sample_R[rows_N].to(device)
    advantages_N = table.advantage_R[rows_N].to(device)
    loss_mask_N = table.loss_mask_R[rows_N].to(device)
    old_logprobs_N, mask_N = old_logprobs_N.to(device), mask_N.to(device)
    num_tokens_N = table.num_loss_tokens_B.to(device)[sequence_N]
    weights = importance_weights(
        old_logprobs_N,
        table.rollout_logprob_R[rows_N].to(device),
        loss_mask_N,
        sequence_N,
        mismatch,
        num_sequences=table.num_samples,
        cp_group=cp_group,
    )
    selected_N = mask_N & (advantages_N != 0)
    gradient_N = selected_N & ~weights.masked_T
    per_sequence = algorithm.denominator == "sequence_tokens"
    divisor_N = num_tokens_N.clamp(min=1) if per_sequence else torch.ones_like(num_tokens_N)
    of_kl_N, of_entropy_N = (
        _weight_of_term(term, 1 / divisor_N, loss_mask_N, mask_N) for term in (kl, entropy_bonus)
    )
    needed_N = needed_rows(
        gradient_N, loss_mask_N, sequence_N, algorithm, table.num_samples, cp_group
    )
    return LossRows(
        old_logprobs_N=old_logprobs_N,
        advantages_N=advantages_N,
        weight_N=weights.weight_T / divisor_N,
        sequence_N=sequence_N,
        num_tokens_N=num_tokens_N,
        gradient_N=gradient_N,
        needed_N=needed_N | (of_kl_N > 0) | (of_entropy_N > 0),
        truncated_N=selected_N & weights.truncated_T,
        masked_N=selected_N & weights.masked_T,
        ref_logprobs_N=old_logprobs_N if ref_logprobs_N is None else ref_logprobs_N.to(device),
        kl_weight_N=of_kl_N,
        entropy_weight_N=of_entropy_N,
    )


def _weight_of_term(
    term: KLConfig | EntropyBonusConfig, share_N: Tensor, loss_mask_N: Tensor, mask_N: Tensor
) -> Tensor:
    """share_N where the term reaches, 0 elsewhere; without a coefficient it reaches nothing."""
    if not term.coefficient:
        return torch.zeros_like(share_N)
    return torch.where(loss_mask_N if term.tokens == "all" else mask_N, share_N, 0.0)


def needed_rows(
    gradient_N: Tensor,
    loss_mask_N: Tensor,
    sequence_N: Tensor,
    algorithm: AlgorithmConfig,
    num_sequences: int,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """bool [N]: the rows whose log-probability the objective takes. The head runs on these, and
    on those that the KL and the entropy bonus reach, and on no other.

    ppo and cispo: those with a gradient. gspo: all loss tokens of a sequence that has such a row,
    be it on another of the ranks that share it.
    """
    if algorithm.objective != "gspo":
        return gradient_N
    counts_B = sums_of_sequences(gradient_N.float(), sequence_N, num_sequences, cp_group)
    return loss_mask_N & (counts_B > 0)[sequence_N]


def loss_denominator(
    table: TokenTable, algorithm: AlgorithmConfig, *, max_response_tokens: int
) -> int:
    """What the sum over the mini-batch's tokens is divided by, the same on every rank.

    Selected or not, and with an advantage or not, all tokens and sequences of the loss mask count.
    With "sequence_tokens" each token's weight already has its own sequence's number of tokens.
    """
    if algorithm.denominator == "tokens":
        return max(table.num_loss_tokens, 1)
    count = max(table.num_loss_sequences, 1)
    return count * (max_response_tokens if algorithm.denominator == "max_response_tokens" else 1)


def policy_loss(
    logprobs_N: Tensor,
    rows: LossRows,
    algorithm: AlgorithmConfig,
    *,
    denominator: int,
    num_sequences: int,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(-1/denominator sum of the weighted surrogates, the ratio of each row).

    logprobs_N: float32, of the rows that `needed_rows` names. `denominator` is the whole optimizer
    mini-batch's: losses of micro-batches and ranks add up. Differentiable in logprobs_N where
    rows.gradient_N; without such a row the result is a connected zero. cp_group, num_sequences: as
    in loss_rows; the ranks of cp_group call this together.
    """
    clip = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
    if algorithm.objective == "gspo":
        ratio_N = sequence_ratio(logprobs_N, rows, num_sequences=num_sequences, cp_group=cp_group)
    else:
        ratio_N = token_ratio(logprobs_N, rows.old_logprobs_N, rows.gradient_N)
    if algorithm.objective == "cispo":
        terms_N = clipped_weight_surrogate(ratio_N, logprobs_N, rows.advantages_N, **clip)
    else:
        dual = algorithm.clip_dual
        terms_N = clipped_surrogate(ratio_N, rows.advantages_N, **clip, clip_dual=dual)
    loss = -torch.where(rows.gradient_N, terms_N * rows.weight_N, 0.0).sum() / denominator
    return loss, ratio_N.detach()


def clipped_surrogate(
    ratio_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = None,
) -> Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and where A < 0 no less than clip_dual A.

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
    """CISPO: the clipped ratio is a constant, so a clipped token keeps its gradient.

    arXiv 2506.13585, which sets no lower bound: clip_low = 1.
    """
    weight_T = ratio_T.detach().clamp(1.0 - clip_low, 1.0 + clip_high)
    return weight_T * advantages_T * logprobs_T


def token_ratio(logprobs_T: Tensor, old_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """pi_theta / pi_old; 1 and without a gradient outside the mask."""
    log_ratio_T = torch.where(mask_T, logprobs_T.detach() - old_logprobs_T, 0.0)
    return _Ratio.apply(logprobs_T, log_ratio_T.exp(), mask_T)


def sequence_ratio(
    logprobs_N: Tensor,
    rows: LossRows,
    *,
    num_sequences: int,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """GSPO-token's ratio: in value the sequence's s_i = exp(1/|y_i| sum of the log-ratios).

    s_i is a constant times pi_theta / sg[pi_theta] of the token (arXiv 2507.18071, section 4.3), so
    the gradient stays with the selected tokens and none goes through the sum over cp_group.
    """
    sums_B = sums_of_sequences(
        logprobs_N - rows.old_logprobs_N, rows.sequence_N, num_sequences, cp_group
    )
    of_sequence_N = (sums_B[rows.sequence_N] / rows.num_tokens_N).exp().float()
    return _Ratio.apply(logprobs_N, of_sequence_N, rows.gradient_N)


class _Ratio(torch.autograd.Function):
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


def clip_counts(
    ratio_T: Tensor, advantages_T: Tensor, mask_T: Tensor, algorithm: AlgorithmConfig
) -> Tensor:
    """int64 [3]: masked tokens that the clip cuts off (below 1 - clip_low, above 1 + clip_high,
    above clip_dual).

    A token counts only when the clip decides: below for a negative advantage, above for a positive
    one, above clip_dual for a negative one. CISPO clips at either sign.
    """
    positive_T, negative_T = mask_T & (advantages_T > 0), mask_T & (advantages_T < 0)
    if algorithm.objective == "cispo":
        positive_T = negative_T = mask_T
    low_T = negative_T & (ratio_T < 1.0 - algorithm.clip_low)
    high_T = positive_T & (ratio_T > 1.0 + algorithm.clip_high)
    dual_T = negative_T & (ratio_T > (algorithm.clip_dual or torch.inf))
    return torch.stack([low_T.sum(), high_T.sum(), dual_T.sum()])


def k3_divergence(logprobs_T: Tensor, other_logprobs_T: Tensor) -> Tensor:
    """k3 estimate of KL(other || this) at tokens sampled from `other`.

    r - 1 - log r with r = this / other: never negative, zero where they agree (Schulman,
    "Approximating KL divergence"). Value and gradient are right to the dtype's last digits however
    small log r is: it is x^2/2 then, which the difference would lose.
    """
    log_ratio_T = logprobs_T - other_logprobs_T
    x_T = log_ratio_T.double()
    series_T = x_T.square() * (0.5 + x_T * (1 / 6 + x_T / 24))
    divergence_T = torch.where(x_T.abs() < 1e-4, series_T, x_T.expm1() - x_T)
    return divergence_T.to(log_ratio_T.dtype)

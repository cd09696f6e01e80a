"""The policy's loss: the rows of a mini-batch, the denominator, the sum of an objective's terms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.algorithms.mismatch import importance_weights, sums_of_sequences
from megafork.algorithms.objectives import LossInputs, Objective, Rows, load_objective
from megafork.algorithms.surrogates import token_ratio
from megafork.data.token_table import TokenTable
from megafork.errors import UserError

if TYPE_CHECKING:
    from megafork.config import AlgorithmConfig, EntropyBonusConfig, KLConfig, MismatchConfig


@dataclass(frozen=True)
class LossRows:
    """The columns that the loss needs of N tokens besides their log-probability."""

    old_logprobs_N: Tensor
    rollout_logprobs_N: Tensor
    advantages_N: Tensor
    weight_N: Tensor
    """float32, constant: the mismatch correction, the credit and the share of `sequence_tokens`"""
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


@dataclass(frozen=True)
class LossSettings:
    """The sections of the config that a loss is made by."""

    algorithm: AlgorithmConfig
    mismatch: MismatchConfig
    kl: KLConfig
    entropy_bonus: EntropyBonusConfig


@dataclass(frozen=True)
class ScoredRows:
    """A rank's rows of a mini-batch, with what scoring, selection and credit say of each."""

    rows_N: Tensor
    """int64: rows of the token table"""
    old_logprobs_N: Tensor
    """float32: the ratio's denominator"""
    mask_N: Tensor
    """bool: the forking mask"""
    credit_N: Tensor | float = 1.0
    """float32 on the loss's device: the weight of each row"""
    ref_logprobs_N: Tensor | None = None
    """float32, the reference policy's: needed where kl has a coefficient"""


def loss_rows(
    table: TokenTable,
    scored: ScoredRows,
    settings: LossSettings,
    *,
    device: torch.device,
    cp_group: dist.ProcessGroup | None = None,
) -> LossRows:
    """Return the columns of one rank's rows of a mini-batch, on `device`.

    cp_group: the ranks that share each sequence, which all call this together; None: each sequence
    is whole on its rank.
    """
    rows_N, ref_logprobs_N = scored.rows_N, scored.ref_logprobs_N
    assert ref_logprobs_N is not None or not settings.kl.coefficient, "no reference has scored"
    _, needs = load_objective(settings.algorithm.objective)
    sequence_N = table.sample_R[rows_N].to(device)
    advantages_N = table.advantage_R[rows_N].to(device)
    loss_mask_N = table.loss_mask_R[rows_N].to(device)
    old_logprobs_N, mask_N = scored.old_logprobs_N.to(device), scored.mask_N.to(device)
    num_tokens_N = table.num_loss_tokens_B.to(device)[sequence_N]
    rollout_logprobs_N = table.rollout_logprob_R[rows_N].to(device)
    weights = importance_weights(
        old_logprobs_N,
        rollout_logprobs_N,
        loss_mask_N,
        sequence_N,
        settings.mismatch,
        num_sequences=table.num_samples,
        cp_group=cp_group,
    )
    selected_N = mask_N & (scored.credit_N != 0) & ((advantages_N != 0) | (needs == "all"))
    gradient_N = selected_N & ~weights.masked_T
    per_sequence = settings.algorithm.denominator == "sequence_tokens"
    divisor_N = num_tokens_N.clamp(min=1) if per_sequence else torch.ones_like(num_tokens_N)
    of_kl_N, of_entropy_N = (
        _weight_of_term(term, 1 / divisor_N, loss_mask_N, mask_N)
        for term in (settings.kl, settings.entropy_bonus)
    )
    needed_N = needed_rows(gradient_N, loss_mask_N, sequence_N, needs, table.num_samples, cp_group)
    return LossRows(
        old_logprobs_N=old_logprobs_N,
        rollout_logprobs_N=rollout_logprobs_N,
        advantages_N=advantages_N,
        weight_N=weights.weight_T * scored.credit_N / divisor_N,
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
    """Return share_N where the term reaches and 0 elsewhere: everywhere without a coefficient."""
    if not term.coefficient:
        return torch.zeros_like(share_N)
    return torch.where(loss_mask_N if term.tokens == "all" else mask_N, share_N, 0.0)


def needed_rows(
    gradient_N: Tensor,
    loss_mask_N: Tensor,
    sequence_N: Tensor,
    needs: Rows,
    num_sequences: int,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return which rows' log-probability the objective takes, bool [N]; the head runs on these.

    "gradient": those with a gradient; "sequence": all loss tokens of a sequence that has such a
    row, be it on another of the ranks that share it; "all": all loss tokens. (The head also runs on
    the rows that the KL and the entropy bonus reach.)
    """
    if needs == "gradient":
        return gradient_N
    if needs == "all":
        return loss_mask_N
    counts_B = sums_of_sequences(gradient_N.float(), sequence_N, num_sequences, cp_group)
    return loss_mask_N & (counts_B > 0)[sequence_N]


def loss_denominator(
    table: TokenTable, algorithm: AlgorithmConfig, *, max_response_tokens: int
) -> int:
    """Return what the sum over the mini-batch's tokens is divided by, the same on every rank.

    Selected or not, and with an advantage or not, all tokens and sequences of the loss mask count.
    With "sequence_tokens" each token's weight already has its own sequence's number of tokens.
    """
    if algorithm.denominator == "tokens":
        return max(table.num_loss_tokens, 1)
    count = max(table.num_loss_sequences, 1)
    return count * (max_response_tokens if algorithm.denominator == "max_response_tokens" else 1)


@dataclass(frozen=True)
class PolicyLoss:
    """The policy's share of a micro-batch's loss, and what is reported of it."""

    loss: Tensor
    """float32 scalar, differentiable"""
    ratio_N: Tensor
    """float32, detached"""
    metrics: dict[str, Tensor]
    """by name the sum over the rows with a gradient, float64 scalars"""


def policy_loss(
    logprobs_N: Tensor,
    rows: LossRows,
    algorithm: AlgorithmConfig,
    objective: Objective,
    *,
    denominator: int,
    num_sequences: int,
    cp_group: dist.ProcessGroup | None = None,
) -> PolicyLoss:
    """Return 1/denominator times the sum of the objective's weighted terms.

    logprobs_N: float32, of the rows that `needed_rows` names. `denominator` is the whole optimizer
    mini-batch's: losses of micro-batches and ranks add up. Differentiable in logprobs_N where
    rows.gradient_N; without such a row the result is a connected zero. cp_group, num_sequences: as
    in loss_rows; the ranks of cp_group call this together.
    Raises UserError where the objective returns terms or metrics of another shape.
    """
    inputs = LossInputs(
        logprobs_N=logprobs_N,
        old_logprobs_N=rows.old_logprobs_N,
        rollout_logprobs_N=rows.rollout_logprobs_N,
        ref_logprobs_N=rows.ref_logprobs_N,
        advantages_N=rows.advantages_N,
        gradient_N=rows.gradient_N,
        sequence_N=rows.sequence_N,
        num_tokens_N=rows.num_tokens_N,
        num_sequences=num_sequences,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        clip_dual=algorithm.clip_dual,
        cp_group=cp_group,
    )
    outputs = objective(inputs)
    for name, column_N in (("terms_N", outputs.terms_N), *outputs.metrics.items()):
        if column_N.shape != logprobs_N.shape:
            raise UserError(
                f"algorithm.objective={algorithm.objective!r} returned {name} of shape "
                f"{list(column_N.shape)} for {len(logprobs_N)} rows: return one number for each row"
            )
    ratio_N = outputs.ratio_N
    if ratio_N is None:
        ratio_N = token_ratio(logprobs_N, rows.old_logprobs_N, rows.gradient_N)
    terms_N = torch.where(rows.gradient_N, outputs.terms_N * rows.weight_N, 0.0)
    return PolicyLoss(
        terms_N.sum() / denominator,
        ratio_N.detach(),
        {
            name: torch.where(rows.gradient_N, column_N.detach().double(), 0.0).sum()
            for name, column_N in outputs.metrics.items()
        },
    )

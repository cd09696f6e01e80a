"""Rows of a loss, by hand."""

from __future__ import annotations

import torch

from megafork.algorithms.losses import LossRows


def rows_of(advantages, mask, *, old=None, sequence=None, num_tokens=None):
    """All in one sequence unless told; every row is needed and has a weight of 1."""
    n = len(advantages)
    mask = torch.as_tensor(mask)
    sequence = torch.zeros(n, dtype=torch.int64) if sequence is None else torch.tensor(sequence)
    return LossRows(
        old_logprobs_N=torch.zeros(n) if old is None else old,
        rollout_logprobs_N=torch.zeros(n),
        advantages_N=torch.as_tensor(advantages),
        weight_N=torch.ones(n),
        sequence_N=sequence,
        num_tokens_N=torch.bincount(sequence)[sequence] if num_tokens is None else num_tokens,
        gradient_N=mask,
        needed_N=torch.ones(n, dtype=torch.bool),
        truncated_N=torch.zeros(n, dtype=torch.bool),
        masked_N=torch.zeros(n, dtype=torch.bool),
        ref_logprobs_N=torch.zeros(n),
        kl_weight_N=torch.zeros(n),
        entropy_weight_N=torch.zeros(n),
    )

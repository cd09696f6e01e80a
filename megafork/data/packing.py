"""Micro-batches: whole sequences, without padding between them, up to a token budget.

The plan is a function of the sequence lengths alone, so every rank computes the same one and
nothing is sent. Scoring and update use the same packs, so that at the first optimizer step after
scoring the ratio is exactly 1.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megafork.errors import UserError
from megafork.types import TokenTable


def plan_micro_batches(
    lengths_B: Sequence[int], *, dp_size: int, token_budget: int
) -> list[list[list[int]]]:
    """Assign sequences to dp_size ranks and their micro-batches: plan[dp_rank][micro_batch].

    Every rank gets the same number of micro-batches, the fewest for which longest-first placement
    into the emptiest one stays within the budget; some may be empty when there are few sequences.
    Raises UserError for a sequence longer than the budget.
    """
    longest = max(lengths_B, default=0)
    if longest > token_budget:
        raise UserError(
            f"a sequence of {longest} tokens does not fit a micro-batch of {token_budget}: raise "
            f"micro_batch_tokens to at least {longest}"
        )
    order = sorted(range(len(lengths_B)), key=lambda b: (-lengths_B[b], b))
    per_rank = max(1, -(-sum(lengths_B) // (dp_size * token_budget)))
    while True:
        bins = _place(order, lengths_B, dp_size * per_rank, token_budget)
        if bins is not None:
            return [bins[rank::dp_size] for rank in range(dp_size)]
        per_rank += 1


def _place(
    order: Sequence[int], lengths_B: Sequence[int], num_bins: int, budget: int
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for b in order:
        load, index = heap[0]
        if load + lengths_B[b] > budget:
            return None
        bins[index].append(b)
        heapq.heapreplace(heap, (load + lengths_B[b], index))
    return bins


@dataclass(frozen=True)
class Pack:
    """One micro-batch on its device. The hidden state of slot t predicts the token after it.

    The last token of a response predicts nothing and is not fed.
    """

    tokens_T: Tensor
    """int64 [T], padded at the end to the multiple that sequence parallelism asks for"""
    positions_T: Tensor
    cu_seqlens: Tensor
    """int32 [sequences + 1]; trailing pad slots are a sequence of their own"""
    max_seqlen: int
    slots_N: Tensor
    """int64 [N]: slots whose hidden state predicts a response token"""
    targets_N: Tensor
    """int64 [N]: those response tokens"""
    rows_N: Tensor
    """int64 [N], on the CPU: their rows in the token table"""

    def keep(self, mask_N: Tensor) -> Pack:
        """The same tokens, with only the masked predictions (bool [N], on the pack's device)."""
        return replace(
            self,
            slots_N=self.slots_N[mask_N],
            targets_N=self.targets_N[mask_N],
            rows_N=self.rows_N[mask_N.cpu()],
        )


def build_pack(
    table: TokenTable, samples: Sequence[int], *, multiple: int, device: torch.device
) -> Pack:
    """Join prompt and response of `samples` into one pack whose length is a multiple."""
    tokens: list[Tensor] = []
    slots: list[Tensor] = []
    rows: list[Tensor] = []
    lengths: list[int] = []
    start = 0
    for sample in samples:
        prompt, span = table.prompt(sample), table.rows(sample)
        fed = torch.cat([prompt, table.token_R[span]])[:-1]
        num_fed = len(fed)
        if num_fed == 0:
            continue  # a prompt of one token without a response
        tokens.append(fed)
        slots.append(torch.arange(start + len(prompt) - 1, start + num_fed))
        rows.append(torch.arange(span.start, span.stop))
        lengths.append(num_fed)
        start += num_fed
    padding = -start % multiple if start else multiple
    if padding:
        tokens.append(torch.zeros(padding, dtype=torch.int64))
        lengths.append(padding)
    rows_N = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    slots_N = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64)
    lengths_S = torch.tensor(lengths)
    return Pack(
        tokens_T=torch.cat(tokens).to(device),
        positions_T=torch.cat([torch.arange(n) for n in lengths]).to(device),
        cu_seqlens=torch.cat([torch.zeros(1), lengths_S.cumsum(0)]).int().to(device),
        max_seqlen=max(lengths),
        slots_N=slots_N.to(device),
        targets_N=table.token_R[rows_N].to(device),
        rows_N=rows_N,
    )


def fed_lengths(table: TokenTable) -> list[int]:
    """Tokens that each sample puts into a pack."""
    return (table.prompt_lengths_B + table.response_lengths_B - 1).tolist()

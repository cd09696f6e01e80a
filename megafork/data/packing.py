"""Micro-batches: whole sequences, without padding between them, up to a token budget.

The plan is a function of the sequence lengths alone, so every rank computes the same one and
nothing is sent. Scoring and update use the same packs, so that at the first optimizer step after
scoring the ratio is exactly 1.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megafork.data.token_table import TokenTable
from megafork.errors import UserError
from megafork.parallel.zigzag import Zigzag


def plan_micro_batches(
    lengths_B: Sequence[int],
    *,
    dp_size: int,
    token_budget: int,
    cp_size: int = 1,
    count_multiple: int = 1,
) -> list[list[list[int]]]:
    """Assign sequences to dp_size ranks and their micro-batches: plan[dp_rank][micro_batch].

    token_budget: tokens of a micro-batch on one rank; its cp_size context-parallel ranks hold one
    sequence together. Every rank gets the same number of micro-batches, the smallest multiple of
    count_multiple for which longest-first placement into the emptiest one stays within the
    budget; some may be empty when there are few sequences.
    Raises UserError for a sequence longer than the budget.
    """
    budget = token_budget * cp_size
    longest = max(lengths_B, default=0)
    if longest > budget:
        together = f" on each of cp={cp_size} ranks" if cp_size > 1 else ""
        raise UserError(
            f"a sequence of {longest} tokens does not fit a micro-batch of {token_budget}"
            f"{together}: raise micro_batch_tokens to at least {-(-longest // cp_size)}"
        )
    order = sorted(range(len(lengths_B)), key=lambda b: (-lengths_B[b], b))
    fewest = max(1, -(-sum(lengths_B) // (dp_size * budget)))
    per_rank = fewest + -fewest % count_multiple
    while True:
        bins = _place(order, lengths_B, dp_size * per_rank, budget)
        if bins is not None:
            return [bins[rank::dp_size] for rank in range(dp_size)]
        per_rank += count_multiple


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
    """A rank's part of a micro-batch. The hidden state of slot t predicts the token after it.

    The last token of a response predicts nothing and is not fed. Under context parallelism a rank
    holds some slots of every sequence (parallel/zigzag.py), and the targets were shifted before.
    """

    tokens_T: Tensor
    """int64 [T], padded to the multiples that context and sequence parallelism ask for"""
    positions_T: Tensor
    cu_seqlens: Tensor
    """int32 [sequences + 1], of the whole micro-batch; trailing pad slots are a sequence too"""
    max_seqlen: int
    slots_N: Tensor
    """int64 [N], ascending: slots whose hidden state predicts a response token"""
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
    table: TokenTable, samples: Sequence[int], *, part: Zigzag, device: torch.device
) -> Pack:
    """Join prompt and response of `samples` into one pack and take this rank's part of it."""
    assert table.held_B[list(samples)].all(), "rows that are not here"
    tokens: list[Tensor] = []
    row_of_slot: list[Tensor] = []
    lengths: list[int] = []

    def add(fed: Tensor, rows: Tensor, length: int) -> None:
        tokens.append(F.pad(fed, (0, length - len(fed))))
        row_of_slot.append(F.pad(rows, (len(fed) - len(rows), length - len(fed)), value=-1))
        lengths.append(length)

    for sample in samples:
        prompt, span = table.prompt(sample), table.rows(sample)
        fed = torch.cat([prompt, table.token_R[span]])[:-1]
        if len(fed):  # else a prompt of one token without a response
            add(fed, torch.arange(span.start, span.stop), part.padded(len(fed)))
    nothing = torch.zeros(0, dtype=torch.int64)
    padding = -sum(lengths) % part.pack_multiple if lengths else part.pack_multiple
    if padding:
        add(nothing, nothing, padding)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    own_T = part.slots(cu_seqlens)
    row_T = torch.cat(row_of_slot)[own_T]
    slots_N = (row_T >= 0).nonzero()[:, 0]
    rows_N = row_T[slots_N]
    return Pack(
        tokens_T=torch.cat(tokens)[own_T].to(device),
        positions_T=torch.cat([torch.arange(n) for n in lengths])[own_T].to(device),
        cu_seqlens=cu_seqlens.to(device),
        max_seqlen=max(lengths),
        slots_N=slots_N.to(device),
        targets_N=table.token_R[rows_N].to(device),
        rows_N=rows_N,
    )


def fed_lengths(table: TokenTable) -> list[int]:
    """Return the number of tokens that each sample feeds to the model."""
    return (table.prompt_lengths_B + table.response_lengths_B - 1).tolist()

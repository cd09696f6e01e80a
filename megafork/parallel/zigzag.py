"""The cut of a pack for context parallelism: every sequence in 2 cp equal chunks, two a rank.

Rank r holds chunks r and 2 cp - 1 - r, one after the other, so that all ranks have the same share
of causal attention. megatron-core's rotary embedding and TransformerEngine's attention expect this
order of packed sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Zigzag:
    """A rank's part of a pack. With cp_size 1 it is the whole pack."""

    cp_rank: int = 0
    cp_size: int = 1
    tp_size: int = 1
    """ranks that cut the part further under sequence parallelism; 1 without it"""

    @property
    def sequence_multiple(self) -> int:
        """The number that a sequence's padded length is a multiple of."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """The number that a pack's padded length is a multiple of."""
        return math.lcm(self.sequence_multiple, self.cp_size * self.tp_size)

    def padded(self, length: int) -> int:
        return length + -length % self.sequence_multiple

    def slots(self, cu_seqlens: Tensor) -> Tensor:
        """int64 [T / cp]: which slots of the whole pack this rank holds, in its order.

        cu_seqlens: int [sequences + 1], offsets of the padded sequences in the whole pack.
        """
        return self._slots_of(self.cp_rank, cu_seqlens.long())

    def order_of_gathered(self, cu_seqlens: Tensor) -> Tensor:
        """int64 [T]: indices that put the ranks' parts, joined in rank order, into pack order."""
        cu_seqlens = cu_seqlens.long()
        return torch.cat([self._slots_of(r, cu_seqlens) for r in range(self.cp_size)]).argsort()

    def _slots_of(self, rank: int, cu_seqlens: Tensor) -> Tensor:
        length = int(cu_seqlens[-1]) // self.cp_size
        index = torch.arange(length, device=cu_seqlens.device)
        if self.cp_size == 1:
            return index
        starts, chunks = cu_seqlens[:-1], cu_seqlens.diff() // (2 * self.cp_size)
        sequence = torch.repeat_interleave(
            torch.arange(len(chunks), device=chunks.device), 2 * chunks, output_size=length
        )
        chunk = chunks[sequence]
        offset = index - starts[sequence] // self.cp_size
        second = offset >= chunk
        which = torch.where(second, 2 * self.cp_size - 1 - rank, rank)
        return starts[sequence] + which * chunk + offset - second * chunk

"""Our two layers for megatron-core's local spec, plugged in through its ModuleSpec.

On a GPU with TransformerEngine neither is used: its fused layers take their place.
Shapes: T packed tokens of this rank, L of the whole pack (T = L / cp), H hidden, Q/K query/kv heads
on this rank, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megafork.parallel.zigzag import Zigzag


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight says that it sees only a slice of the sequence (sequence parallelism).

    megatron-core's own wrapper of torch.nn.RMSNorm refuses sequence parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            dtype=config.params_dtype,
            device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(torch.nn.Module):
    """Causal attention inside each sequence of a pack (thd), by scaled_dot_product_attention.

    Neighbouring sequences of similar length are padded at their ends and run as one batch: under
    a causal mask a pad key is seen by pad queries only, and those are dropped.

    Under context parallelism keys and values are gathered from all ranks, and each rank's queries
    see those of the whole sequence up to their own position.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp
        self.part = Zigzag(self.cp_group.rank(), self.cp_group.size())

    def forward(
        self,
        q_TQD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        cu_seqlens = packed_seq_params.cu_seqlens_q
        lengths = cu_seqlens.diff().tolist()
        own_positions_T = None
        if self.part.cp_size > 1:
            order_L = self.part.order_of_gathered(cu_seqlens)
            k_TKD, v_TKD = (
                gather_from_sequence_parallel_region(x, group=self.cp_group)[order_L]
                for x in (k_TKD, v_TKD)
            )
            positions_L = torch.cat([torch.arange(n, device=q_TQD.device) for n in lengths])
            own_positions_T = positions_L[self.part.slots(cu_seqlens)]
        runs = list(similar_runs(lengths))
        queries = PaddedRuns(self._own(lengths), runs, q_TQD.device)
        keys = queries if self.part.cp_size == 1 else PaddedRuns(lengths, runs, q_TQD.device)
        position_parts = None if own_positions_T is None else queries.pad(own_positions_T)
        q_parts, k_parts, v_parts = queries.pad(q_TQD), keys.pad(k_TKD), keys.pad(v_TKD)
        outputs = []
        for index in range(len(runs)):
            q, k, v = (parts[index].transpose(1, 2) for parts in (q_parts, k_parts, v_parts))
            seen = None
            if position_parts is not None:
                position = position_parts[index][:, None, :, None]
                seen = torch.arange(k.shape[2], device=k.device) <= position
            outputs.append(self.attend(q, k, v, seen, self.softmax_scale).transpose(1, 2))
        return queries.unpad(outputs).flatten(1)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None) -> Tensor:
        """[batch, heads, tokens, D] of each; seen: which keys a query sees, None: the past."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=seen is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def _own(self, lengths: list[int]) -> list[int]:
        """Tokens of each sequence on this rank."""
        return [n // self.part.cp_size for n in lengths]


class PaddedRuns:
    """Pads each run of a pack's sequences to its longest one, and takes the padding away again.

    lengths: tokens of each sequence; runs: [start, stop) of the sequences that share a batch.
    Padding and its backward are one copy each, whatever the number of sequences: the backward of
    torch's pad_sequence copies the whole padded gradient once for every sequence.
    """

    def __init__(
        self, lengths: list[int], runs: list[tuple[int, int]], device: torch.device
    ) -> None:
        self.shapes = [(stop - start, max(lengths[start:stop])) for start, stop in runs]
        self.sizes = [count * longest for count, longest in self.shapes]
        padded_lengths = [longest for count, longest in self.shapes for _ in range(count)]
        padding_before = accumulate(
            (padded - n for padded, n in zip(padded_lengths[:-1], lengths[:-1], strict=True)),
            initial=0,
        )
        shift_T = torch.repeat_interleave(
            torch.tensor(list(padding_before), device=device),
            torch.tensor(lengths, device=device),
            output_size=sum(lengths),
        )
        self.slots_T = torch.arange(sum(lengths), device=device) + shift_T

    def pad(self, rows_T: Tensor) -> list[Tensor]:
        """[T, ...] -> for each run [sequences, longest, ...], with zeros behind each sequence."""
        padded = rows_T.new_zeros(sum(self.sizes), *rows_T.shape[1:])
        parts = padded.index_copy_(0, self.slots_T, rows_T).split(self.sizes)
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """Undo `pad`: one tensor for each run -> [T, ...]."""
        return _TakeRows.apply(torch.cat([part.flatten(0, 1) for part in parts]), self.slots_T)


class _TakeRows(torch.autograd.Function):
    """rows[slots] for slots of which none occurs twice: its backward copies and adds nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots_T: Tensor) -> Tensor:
        ctx.save_for_backward(slots_T)
        ctx.num_rows = len(rows)
        return rows.index_select(0, slots_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (slots_T,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, slots_T, grad), None


def similar_runs(lengths: list[int], max_waste: float = 1.5) -> Iterator[tuple[int, int]]:
    """Consecutive runs [start, stop) whose padded size is at most `max_waste` of their tokens."""
    start = longest = total = 0
    for index, length in enumerate(lengths):
        padded = max(longest, length) * (index + 1 - start)
        if index > start and padded > max_waste * (total + length):
            yield start, index
            start, longest, total = index, 0, 0
        longest, total = max(longest, length), total + length
    yield start, len(lengths)

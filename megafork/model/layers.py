"""Our two layers for megatron-core's local spec, plugged in through its ModuleSpec.

On a GPU with TransformerEngine neither is used: its fused layers take their place.
Shapes: T packed tokens, H hidden, Q/K query/kv heads on this rank, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor


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
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

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
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        q_parts, k_parts, v_parts = (x.split(lengths) for x in (q_TQD, k_TKD, v_TKD))
        outputs = []
        for start, stop in similar_runs(lengths):
            q, k, v = (
                torch.nn.utils.rnn.pad_sequence(parts[start:stop], batch_first=True).transpose(1, 2)
                for parts in (q_parts, k_parts, v_parts)
            )
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            ).transpose(1, 2)
            outputs += [row[:n] for row, n in zip(out, lengths[start:stop], strict=True)]
        return torch.cat(outputs).flatten(1)


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

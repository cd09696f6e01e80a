"""Fake kernels for the meta device: they keep and allocate what a GPU's fused kernels do.

Each has the shapes, dtypes and lifetimes of its kernel and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer import mlp
from torch import Tensor
from torch.autograd import Function

from megafork.model.layers import PackedAttention, RMSNorm

HEAD_TILE = 128
"""Columns of a tile of ops/kernels/linear_head.py; it holds three numbers of each."""
HEAD_LOGITS = 1 << 26
"""Gradients of logits that exist there at once."""
_HEAD_FLOAT64 = 6 << 24
"""Partials brought to float64 at once, with the temporaries of doing so."""


class _Attention(Function):
    """FlashAttention over packed sequences: keeps its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx: Any, q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        out = torch.empty_like(q_TQD)
        log_sums = q_TQD.new_empty(q_TQD.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q_TQD, k_TKD, v_TKD, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _Norm(Function):
    """torch's fused RMSNorm (and TransformerEngine's): keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _SwiGLU(Function):
    """megatron's fused SwiGLU: keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.empty_like(ctx.saved_tensors[0])


class TritonHead(Function):
    """ops/kernels/linear_head.py: (log-probabilities, entropies) of N rows."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, num_tiles = len(hidden_NH), -(-len(weight_VH) // HEAD_TILE)
        partials = hidden_NH.new_empty(3, num_tiles, num_rows, dtype=torch.float32)
        wide = hidden_NH.new_empty(min(_HEAD_FLOAT64, 16 * partials.numel()), dtype=torch.uint8)
        del partials, wide
        ctx.save_for_backward(hidden_NH, weight_VH)
        statistics = hidden_NH.new_empty(2, num_rows, dtype=torch.float32)
        return statistics[0].clone(), statistics[1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        hidden_NH, weight_VH = ctx.saved_tensors
        num_rows, width = len(hidden_NH), len(weight_VH)
        grad_hidden = torch.empty_like(hidden_NH, dtype=torch.float32)
        columns = max(1, HEAD_LOGITS // max(1, num_rows) // HEAD_TILE) * HEAD_TILE
        chunk = hidden_NH.new_empty(num_rows, min(columns, width))
        # The weight's product goes into main_grad, after that of the hidden states.
        product = torch.empty_like(grad_hidden)
        del product
        product = hidden_NH.new_empty(chunk.shape[1], hidden_NH.shape[1], dtype=torch.float32)
        del product, chunk
        return grad_hidden.to(hidden_NH.dtype), None


@contextmanager
def in_place(gpts: list[torch.nn.Module]) -> Iterator[None]:
    """Run these models through the fake kernels in this context."""
    for gpt in gpts:
        for module in gpt.modules():
            if isinstance(module, PackedAttention):
                module.forward = _packed_attention  # type: ignore[method-assign]
            elif isinstance(module, RMSNorm):
                module.forward = lambda x, weight=module.weight: _Norm.apply(x, weight)  # type: ignore[method-assign,assignment,misc]
        gpt.config.bias_activation_fusion = True  # type: ignore[union-attr]
    before = mlp.bias_swiglu_impl
    mlp.bias_swiglu_impl = lambda x, *_: _SwiGLU.apply(x)
    try:
        yield
    finally:
        mlp.bias_swiglu_impl = before


def _packed_attention(
    q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> Tensor:
    return _Attention.apply(q_TQD, k_TKD, v_TKD).flatten(1)

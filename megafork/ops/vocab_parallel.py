"""Log-probability and entropy of tokens from vocabulary shards, bit-identical at every TP degree.

`logprob_and_entropy` takes logits, `linear_logprob_and_entropy` hidden states and the head's
weight: it computes logits a few tokens at a time, forward and again backward, and never holds
[T, V]. On CUDA the Triton version of kernels/linear_head.py does, where Triton is installed.

Shapes: T tokens, V columns of this rank's vocabulary shard, C of them that are no padding, H
hidden. The arithmetic of a row is in softmax_rows.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.ops import kernels
from megafork.ops.softmax_rows import (
    MIN_ROWS,
    Rows,
    Shard,
    all_reduce,
    product,
    slices,
    tiles,
)

_MAX_VOCAB = 2**18
_CHUNK_LOGITS = 1 << 25
"""The head's product is taken for about this many logits at once: 128 MiB. Half as many cost 7%."""


def logprob_and_entropy(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    entropy_temperature: float | Tensor | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of `targets_T` and entropy (nats) of every row, both float32 [T].

    logits_TV: this rank's contiguous vocabulary shard, any float dtype; -inf is legal.
    targets_T: global token ids. vocab_size: the true size; columns at or beyond it are padding and
    take no part (None: every column counts). A row that holds NaN or +inf, or nothing but -inf,
    gives NaN on every rank. temperature, entropy_temperature: a float or a [T]
    tensor; the entropy's defaults to the other. tp_group None: the shard is the whole vocabulary.

    Differentiable in logits_TV through both outputs; upstream gradients must be the same on all
    ranks of tp_group. Inputs are never written to. One MAX and one SUM all-reduce.

    Raises ValueError for a target outside the vocabulary and for shapes that do not fit.
    """
    check = _Arguments(logits_TV.shape[-1], tp_group, vocab_size)
    check.tokens(logits_TV, targets_T)
    return _LogprobAndEntropy.apply(
        logits_TV,
        targets_T,
        tp_group,
        _column(temperature, logits_TV),
        None if entropy_temperature is None else _column(entropy_temperature, logits_TV),
        check.vocab_size,
    )


def linear_logprob_and_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float | Tensor = 1.0,
    entropy_temperature: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprob_and_entropy(hidden_TH @ weight_VH.T, ...)` without ever holding [T, V].

    hidden_TH: the same on all ranks of tp_group; weight_VH: this rank's rows of the head. Any float
    dtype; the product is float32. chunk_tokens: rows of a product (None: about 128 MiB of logits).
    One MAX all-reduce for each chunk, one SUM for all. In Triton: one MAX for all; backward, the
    gradients of about chunk_tokens x V logits at once (None: 128 MiB), rounded to bfloat16 where
    hidden_TH and weight_VH are bfloat16.

    The gradient of hidden_TH is returned already summed over tp_group: gather it without another
    reduction in backward (tensor_parallel_output_grad=False under sequence parallelism). The
    gradient of weight_VH is this shard's, accumulated in float32; where the parameter has a
    `main_grad` it goes straight in there. T = 0 gives connected zero gradients.
    """
    check = _Arguments(weight_VH.shape[0], tp_group, vocab_size)
    check.tokens(hidden_TH, targets_T)
    if hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"hidden {list(hidden_TH.shape)} and weight {list(weight_VH.shape)} must be "
            "[T, H], [V, H]"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be positive")
    return _LinearLogprobAndEntropy.apply(
        hidden_TH,
        weight_VH,
        targets_T,
        tp_group,
        _column(temperature, hidden_TH),
        None if entropy_temperature is None else _column(entropy_temperature, hidden_TH),
        check.vocab_size,
        chunk_tokens,
    )


class _LogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, targets_T, tp_group, temperature_T1, entropy_temperature_T1, vocab):
        shard = Shard.of(logits_TV.shape[1], vocab, tp_group)
        logits_TC = logits_TV.detach()[:, : shard.num_columns]
        rows = Rows.empty(targets_T, shard, temperature_T1, entropy_temperature_T1)
        everything = slice(0, len(targets_T))
        rows.find_max(logits_TC, everything, tp_group)
        rows.add_up(logits_TC, everything)
        outputs = rows.finish(tp_group)
        ctx.save_for_backward(logits_TV, *rows.tensors())
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        logits_TV, *tensors = ctx.saved_tensors
        rows = Rows(ctx.shard, *tensors)
        grad_TV, num_columns = torch.empty_like(logits_TV), ctx.shard.num_columns
        grad_TV[:, num_columns:] = 0.0
        rows.logits_gradient(
            logits_TV[:, :num_columns],
            slice(0, len(logits_TV)),
            grad_logprobs_T,
            grad_entropy_T,
            out=grad_TV[:, :num_columns],
        )
        return grad_TV, None, None, None, None, None


class _LinearLogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_TH, weight_VH, targets_T, tp_group, temperature_T1, entropy_temperature_T1,
        vocab, chunk_tokens,
    ):  # fmt: skip
        shard = Shard.of(weight_VH.shape[0], vocab, tp_group)
        rows = Rows.empty(targets_T, shard, temperature_T1, entropy_temperature_T1)
        ctx.in_triton = kernels.usable(hidden_TH)
        if ctx.in_triton:
            from megafork.ops.kernels import linear_head

            linear_head.add_up(rows, hidden_TH, weight_VH, tp_group)
        else:
            buffer, chunks = _chunks(hidden_TH, weight_VH, shard, chunk_tokens)
            for chunk in chunks:
                logits = product(hidden_TH[chunk], weight_VH[: shard.num_columns], buffer)
                rows.find_max(logits, chunk, tp_group)
                rows.add_up(logits, chunk)
        outputs = rows.finish(tp_group)
        ctx.save_for_backward(hidden_TH, weight_VH, *rows.tensors())
        ctx.shard, ctx.tp_group, ctx.chunk_tokens = shard, tp_group, chunk_tokens
        # The parameter itself: what is saved for backward comes back without its attributes.
        ctx.main_grad_VH = getattr(weight_VH, "main_grad", None)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        hidden_TH, weight_VH, *tensors = ctx.saved_tensors
        rows = Rows(ctx.shard, *tensors)
        grad_hidden_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        into_main_grad = ctx.main_grad_VH is not None and ctx.main_grad_VH.dtype == torch.float32
        # Triton adds to a row of the weight's gradient once, so that may have the weight's dtype.
        dtype = weight_VH.dtype if ctx.in_triton else torch.float32
        grad_weight_VH = (
            ctx.main_grad_VH if into_main_grad else torch.zeros_like(weight_VH, dtype=dtype)
        )
        if grad_logprobs_T is not None or grad_entropy_T is not None:
            add_gradients = _add_gradients
            if ctx.in_triton:
                from megafork.ops.kernels.linear_head import add_gradients
            upstream, into = (grad_logprobs_T, grad_entropy_T), (grad_hidden_TH, grad_weight_VH)
            add_gradients(rows, hidden_TH, weight_VH, upstream, into, ctx.chunk_tokens)
        all_reduce(grad_hidden_TH, dist.ReduceOp.SUM, ctx.tp_group)
        returned_VH = (
            # megatron adds this zero when the weight is also an embedding, and drops it otherwise.
            weight_VH.new_zeros(()).expand_as(weight_VH)
            if into_main_grad
            else grad_weight_VH.to(weight_VH.dtype)
        )
        return grad_hidden_TH.to(hidden_TH.dtype), returned_VH, *(None,) * 6


def _add_gradients(
    rows: Rows,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    upstream: tuple[Tensor | None, Tensor | None],
    into: tuple[Tensor, Tensor],
    chunk_tokens: int | None,
) -> None:
    """Add the gradients of hidden (this shard's part) and weight, both float32, to `into`."""
    grad_hidden_TH, grad_weight_VH = into
    num_columns = rows.shard.num_columns
    buffer, chunks = _chunks(hidden_TH, weight_VH, rows.shard, chunk_tokens)
    for chunk in chunks:
        logits = product(hidden_TH[chunk], weight_VH[:num_columns], buffer)
        rows.logits_gradient(logits, chunk, *upstream, out=logits)
        grad_weight_VH[:num_columns].addmm_(logits.T, hidden_TH[chunk].float())
        for tile in tiles(weight_VH[:num_columns]):
            grad_hidden_TH[chunk].addmm_(logits[:, tile], weight_VH[tile].float())


def _chunks(
    hidden_TH: Tensor, weight_VH: Tensor, shard: Shard, chunk_tokens: int | None
) -> tuple[Tensor, list[slice]]:
    """(a buffer for the logits of any chunk, the chunks of tokens).

    Ranks call each other once a chunk, so the chunks follow from the shard's width, padding
    included, which all ranks of the group share, and never from a rank's own number of columns.
    One buffer for all: memory that is new to a process costs more than a softmax.
    """
    step = chunk_tokens or max(MIN_ROWS, _CHUNK_LOGITS // len(weight_VH))
    height = max(MIN_ROWS, min(step, len(hidden_TH)))
    buffer = hidden_TH.new_empty(height, shard.num_columns, dtype=torch.float32)
    return buffer, slices(len(hidden_TH), step)


class _Arguments:
    """Checks of what both functions are handed."""

    def __init__(self, width: int, tp_group: dist.ProcessGroup | None, vocab_size: int | None):
        tp_size = dist.get_world_size(tp_group) if tp_group is not None else 1
        total = width * tp_size
        self.vocab_size = total if vocab_size is None else vocab_size
        if not 0 < self.vocab_size <= min(total, _MAX_VOCAB):
            raise ValueError(
                f"vocab_size={self.vocab_size} must be in 1..{min(total, _MAX_VOCAB)} "
                f"({tp_size} shards of {width} columns)"
            )

    def tokens(self, rows: Tensor, targets_T: Tensor) -> None:
        if rows.dim() != 2 or targets_T.shape != rows.shape[:1]:
            raise ValueError(
                f"rows {list(rows.shape)} and targets {list(targets_T.shape)} must be [T, _], [T]"
            )
        if not targets_T.numel():
            return
        smallest, largest = int(targets_T.min()), int(targets_T.max())
        if not 0 <= smallest <= largest < self.vocab_size:
            raise ValueError(
                f"targets span {smallest}..{largest}, outside the vocabulary of {self.vocab_size}"
            )


def _column(temperature: float | Tensor, logits_TV: Tensor) -> Tensor:
    value = torch.as_tensor(temperature, dtype=torch.float32, device=logits_TV.device)
    if value.dim() == 1 and value.shape != logits_TV.shape[:1]:
        raise ValueError(f"temperature {list(value.shape)} must be a float or [T={len(logits_TV)}]")
    if value.numel() and not bool((value > 0).all()):
        raise ValueError(f"temperature must be positive, got {float(value.min())}")
    return value.expand(logits_TV.shape[0])[:, None]

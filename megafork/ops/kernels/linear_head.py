# mypy: disable-error-code="no-untyped-def"
"""The head's product and its softmax in one Triton kernel: logits live in registers only.

Forward, a program computes BLOCK_T x BLOCK_V logits and writes for each row of the tile its
maximum m, s = sum exp z and u = sum exp(z) z with z = (x - m) / T: a few numbers for 128 logits.
They are brought to the row's maximum in float64 and added up in the fixed point of softmax_rows.py.
The tile is the same whatever the call, so neither the rows beside it nor the number of shards (of
whole tiles: megatron pads the vocabulary to 128 columns a shard) changes a bit of a row.

Backward, a second kernel computes the logits of some columns again and writes their gradient, in
bfloat16 where both inputs are, in float32 otherwise; two products accumulate it in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megafork.ops.softmax_rows import FIXED_POINT_ONE, Rows, all_reduce, slices

BLOCK_V = 128
"""Columns of a tile. Shards of a multiple of it have their tiles at the same global columns."""
_COMBINED_PARTIALS = 1 << 21
"""Partials brought to float64 at once: 16 MiB."""
_CHUNK_LOGITS = 1 << 26
"""Gradients of logits that exist at once: 128 MiB in bfloat16."""
_FORWARD_WARPS, _GRADIENT_WARPS = 4, 8
"""So that two programs fit on a Hopper multiprocessor without spilling: one takes exponentials
while the other multiplies."""


def add_up(
    rows: Rows,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    tp_group: dist.ProcessGroup | None,
) -> None:
    """Find the maximum of every row over all shards (one MAX all-reduce) and this shard's sums."""
    assert rows.sums is not None
    num_tokens, num_columns = len(hidden_TH), rows.shard.num_columns
    num_tiles = triton.cdiv(num_columns, BLOCK_V)
    k = 3 if rows.entropy_temperature_T1 is None else 4
    # P tiles; m, s, u and, if the entropy has its own temperature and u with it, s there.
    partials_kPT = hidden_TH.new_empty(k, num_tiles, num_tokens, dtype=torch.float32)
    target_T = torch.zeros_like(rows.max_T1[:, 0])
    if partials_kPT.numel():
        _launch(
            _forward_kernel,
            *_operands(rows, hidden_TH, weight_VH),
            target_T, *partials_kPT, *(None,) * (4 - k),
            **_sizes(hidden_TH, weight_VH, num_columns, _FORWARD_WARPS),
        )  # fmt: skip
        # The bits of the owner's float32 travel as an integer; all others add zero.
        rows.sums[-2] = target_T.view(torch.int32).long()
        local_T = partials_kPT[0].amax(0)
        rows.sums[-1] = local_T.isnan().long()
        local_T.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    else:
        local_T = torch.full_like(target_T, -torch.inf)
    all_reduce(local_T, dist.ReduceOp.MAX, tp_group)
    rows.max_T1[:] = local_T[:, None]
    for tiles in slices(num_tiles, max(1, _COMBINED_PARTIALS // max(1, num_tokens))):
        _combine(rows, partials_kPT[:, tiles])


def _combine(rows: Rows, partials_kPT: Tensor) -> None:
    """Add tiles to the sums: exp((m - M) / T) takes a tile from its maximum m to the row's M."""
    assert rows.sums is not None
    s_PT, u_PT = partials_kPT[1], partials_kPT[2]
    up_PT = partials_kPT[0].double() - rows.max_T1[:, 0].double()
    shift_PT = up_PT / rows.temperature_T1[:, 0].double()
    s_PT = shift_PT.exp() * s_PT
    rows.sums[0] += _fixed_point_sum(s_PT)
    if rows.entropy_temperature_T1 is not None:
        shift_PT = up_PT / rows.entropy_temperature_T1[:, 0].double()
        s_PT = shift_PT.exp() * partials_kPT[3]
        rows.sums[2] += _fixed_point_sum(s_PT)
    u_PT = shift_PT.exp() * u_PT + s_PT * shift_PT
    rows.sums[-3] += _fixed_point_sum(u_PT)


def _fixed_point_sum(terms_PT: Tensor) -> Tensor:
    """Sum in units of 2^-44. NaN (a tile of -inf, a row that is declared invalid) counts as 0."""
    return (terms_PT * FIXED_POINT_ONE).round_().nan_to_num_(nan=0.0).long().sum(0)


def add_gradients(
    rows: Rows,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    upstream: tuple[Tensor | None, Tensor | None],
    into: tuple[Tensor, Tensor],
    chunk_tokens: int | None,
) -> None:
    """Add the gradients of hidden (float32; this shard's part) and weight (any dtype) to `into`.

    upstream: of log-probabilities and entropy. chunk_tokens bounds what exists at once, as
    chunk_tokens x V gradients of logits.
    """
    grad_hidden_TH, grad_weight_VH = into
    num_tokens, num_columns = len(hidden_TH), rows.shard.num_columns
    if not num_tokens or not num_columns:
        return
    dtype = torch.promote_types(hidden_TH.dtype, weight_VH.dtype)
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    at_once = chunk_tokens * num_columns if chunk_tokens else _CHUNK_LOGITS
    step = max(1, at_once // num_tokens // BLOCK_V) * BLOCK_V
    # The interpreter cuts a float32 off where a GPU rounds it to bfloat16.
    written = dtype if hidden_TH.is_cuda else torch.float32
    buffer = hidden_TH.new_empty(num_tokens, min(step, num_columns), dtype=written)
    factors = [None if g is None else g.float().contiguous() for g in upstream]
    statistics = [rows.max_T1, rows.log_s_T1, rows.log_s_H_T1, rows.entropy_T1]
    for chunk in slices(num_columns, step):
        width = chunk.stop - chunk.start
        grad_TC, weight_CH = buffer[:, :width], weight_VH[chunk]
        _launch(
            _gradient_kernel,
            *_operands(rows, hidden_TH, weight_CH, chunk.start),
            *(t.contiguous() for t in statistics), *factors, grad_TC, grad_TC.stride(0),
            **_sizes(hidden_TH, weight_CH, width, _GRADIENT_WARPS),
        )  # fmt: skip
        grad_TC = grad_TC.to(dtype)
        grad_hidden_TH += _product(grad_TC, weight_CH)
        grad_weight_VH[chunk] += _product(grad_TC.T, hidden_TH)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in float32."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# ------------------------------------------------------------------ launches


def _launch(kernel: Any, *operands: Any, **sizes: Any) -> None:
    """Launch one program for every tile, on the device that holds the tensors."""
    token_tiles = triton.cdiv(sizes["num_tokens"], sizes["BLOCK_T"])
    tiles = triton.cdiv(sizes["num_columns"], sizes["BLOCK_V"])
    with torch.cuda.device_of(operands[0]):
        kernel[(token_tiles * tiles,)](*operands, **sizes)


def _operands(rows: Rows, hidden_TH: Tensor, weight_VH: Tensor, start: int = 0) -> tuple[Any, ...]:
    """Return both kernels' first arguments; `weight_VH` starts at the shard's column `start`."""
    entropy_T1 = rows.entropy_temperature_T1
    return (
        hidden_TH, weight_VH, rows.targets_T.contiguous(),
        rows.temperature_T1.contiguous(),
        None if entropy_T1 is None else entropy_T1.contiguous(),
        rows.shard.first + start,
    )  # fmt: skip


def _sizes(
    hidden_TH: Tensor, weight_VH: Tensor, num_columns: int, num_warps: int
) -> dict[str, Any]:
    """Return both kernels' last arguments. Nothing is tuned: timing moves no bit."""
    num_features = hidden_TH.shape[1]
    as_they_are = hidden_TH.dtype == weight_VH.dtype in (torch.bfloat16, torch.float16)
    # float32 products run outside the tensor cores, with their operands in registers.
    block_t, block_h, num_stages = (128, 64, 3) if as_they_are else (64, 16, 2)
    num_warps = num_warps if as_they_are else 8
    return {
        "num_tokens": len(hidden_TH), "num_columns": num_columns, "num_features": num_features,
        "hidden_stride_t": hidden_TH.stride(0), "hidden_stride_h": hidden_TH.stride(1),
        "weight_stride_v": weight_VH.stride(0), "weight_stride_h": weight_VH.stride(1),
        # The interpreter's product knows no bfloat16; float32 products of its values are exact.
        "FLOAT32": not (as_they_are and hidden_TH.is_cuda), "EVEN": num_features % block_h == 0,
        "BLOCK_T": block_t, "BLOCK_V": BLOCK_V, "BLOCK_H": block_h, "GROUP": 16,
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


# ------------------------------------------------------------------ kernels

# A token count that is 1 or a multiple of 16 must not make another kernel, nor must what follows
# from it: where the partials of one kind end and those of the next begin.
_kernel = triton.jit(
    do_not_specialize=["num_tokens", "first"],
    do_not_specialize_on_alignment=["maximum", "sum_exp", "sum_exp_z", "sum_exp_H"],
)


@_kernel
def _forward_kernel(
    hidden, weight, targets, temperature, entropy_temperature, first,
    target_logits, maximum, sum_exp, sum_exp_z, sum_exp_H,
    num_tokens, num_columns, num_features,
    hidden_stride_t, hidden_stride_h, weight_stride_v, weight_stride_h,
    FLOAT32: tl.constexpr, EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes [tiles, tokens]; a NaN maximum stands for a tile with a NaN."""
    token_tile, tile = _tile_of(num_tokens, num_columns, BLOCK_T, BLOCK_V, GROUP)
    rows = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits(
        hidden, weight, rows, columns, num_tokens, num_columns, num_features,
        hidden_stride_t, hidden_stride_h, weight_stride_v, weight_stride_h,
        FLOAT32, EVEN, BLOCK_T, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    there = rows < num_tokens
    counts = columns[None, :] < num_columns
    num_nan = tl.sum(((x != x) & counts).to(tl.int32), 1)
    x = tl.where((x == x) & counts, x, float("-inf"))
    m = tl.max(x, 1)

    column = tl.load(targets + rows, mask=there, other=0) - first
    target = tl.sum(tl.where(columns[None, :] == column[:, None], x, 0.0), 1)
    ours = (column >= tile * BLOCK_V) & (column < tl.minimum((tile + 1) * BLOCK_V, num_columns))
    tl.store(target_logits + rows, target, mask=there & ours)

    to = tile.to(tl.int64) * num_tokens + rows
    tl.store(maximum + to, tl.where(num_nan > 0, float("nan"), m), mask=there)
    x -= m[:, None]  # a tile of -inf gives NaN, which the fixed point takes for 0
    s, u = _sums(x, tl.load(temperature + rows, mask=there, other=1.0))
    tl.store(sum_exp + to, s, mask=there)
    if entropy_temperature is not None:
        s, u = _sums(x, tl.load(entropy_temperature + rows, mask=there, other=1.0))
        tl.store(sum_exp_H + to, s, mask=there)
    tl.store(sum_exp_z + to, u, mask=there)


@_kernel
def _gradient_kernel(
    hidden, weight, targets, temperature, entropy_temperature, first,
    maximum, log_s, log_s_H, entropy, grad_logprobs, grad_entropy, out, out_stride_t,
    num_tokens, num_columns, num_features,
    hidden_stride_t, hidden_stride_h, weight_stride_v, weight_stride_h,
    FLOAT32: tl.constexpr, EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d logp/dx_j = (1[j = target] - p_j) / T, d H/dx_j = -p_j (log p_j + H) / T, as in torch."""
    token_tile, tile = _tile_of(num_tokens, num_columns, BLOCK_T, BLOCK_V, GROUP)
    rows = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = _logits(
        hidden, weight, rows, columns, num_tokens, num_columns, num_features,
        hidden_stride_t, hidden_stride_h, weight_stride_v, weight_stride_h,
        FLOAT32, EVEN, BLOCK_T, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    there = rows < num_tokens
    x -= tl.load(maximum + rows, mask=there, other=0.0)[:, None]
    per_t = 1.0 / tl.load(temperature + rows, mask=there, other=1.0)
    log_s_T = tl.load(log_s + rows, mask=there, other=0.0)
    slope, offset = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    grad = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    if grad_logprobs is not None:
        upstream = tl.load(grad_logprobs + rows, mask=there, other=0.0) * per_t
        column = tl.load(targets + rows, mask=there, other=0) - first
        grad = tl.where(columns[None, :] == column[:, None], upstream[:, None], 0.0)
        offset -= upstream
    if grad_entropy is not None:
        upstream = tl.load(grad_entropy + rows, mask=there, other=0.0)
        entropy_T = tl.load(entropy + rows, mask=there, other=0.0)
        if entropy_temperature is not None:
            per_t_H = 1.0 / tl.load(entropy_temperature + rows, mask=there, other=1.0)
            log_s_H_T = tl.load(log_s_H + rows, mask=there, other=0.0)
            own = -upstream * per_t_H
            grad += _gradient_term(x, per_t_H, log_s_H_T, own, own * (entropy_T - log_s_H_T))
        else:
            slope = -upstream * per_t
            offset += slope * (entropy_T - log_s_T)
    grad += _gradient_term(x, per_t, log_s_T, slope, offset)
    to = out + rows.to(tl.int64)[:, None] * out_stride_t + columns[None, :]
    inside = there[:, None] & (columns[None, :] < num_columns)
    tl.store(to, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile_of(num_tokens, num_columns, BLOCK_T, BLOCK_V, GROUP):
    """This program's tiles; GROUP token tiles take turns, so a tile of the weight stays in L2."""
    num_token_tiles, num_tiles = tl.cdiv(num_tokens, BLOCK_T), tl.cdiv(num_columns, BLOCK_V)
    program = tl.program_id(0)
    first = program // (GROUP * num_tiles) * GROUP
    in_group = tl.minimum(num_token_tiles - first, GROUP)
    inside = program % (GROUP * num_tiles)
    return first + inside % in_group, inside // in_group


@triton.jit
def _logits(
    hidden, weight, rows, columns, num_tokens, num_columns, num_features,
    hidden_stride_t, hidden_stride_h, weight_stride_v, weight_stride_h,
    FLOAT32: tl.constexpr, EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_T, BLOCK_V]; rows and columns beyond the end repeat the last one."""
    rows = tl.minimum(rows, num_tokens - 1).to(tl.int64)
    columns = tl.minimum(columns, num_columns - 1).to(tl.int64)
    features = tl.arange(0, BLOCK_H)
    a = hidden + rows[:, None] * hidden_stride_t + features[None, :] * hidden_stride_h
    b = weight + columns[None, :] * weight_stride_v + features[:, None] * weight_stride_h
    logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, num_features, BLOCK_H):
        if EVEN:
            a_TH, b_HV = tl.load(a), tl.load(b)
        else:
            there = features < num_features - start
            a_TH = tl.load(a, mask=there[None, :], other=0.0)
            b_HV = tl.load(b, mask=there[:, None], other=0.0)
        if FLOAT32:
            a_TH, b_HV = a_TH.to(tl.float32), b_HV.to(tl.float32)
        logits = tl.dot(a_TH, b_HV, logits, input_precision="ieee")
        a += BLOCK_H * hidden_stride_h
        b += BLOCK_H * weight_stride_h
    return logits


@triton.jit
def _sums(x, temperature):
    """sum exp z, sum exp(z) z of every row; a term of exp z = 0 is 0, whatever z."""
    z = x * (1.0 / temperature)[:, None]
    e = tl.exp(z)
    return tl.sum(e, 1), tl.sum(tl.where(e > 0.0, e * z, 0.0), 1)


@triton.jit
def _gradient_term(x, per_t, log_s, slope, offset):
    """p (slope z + offset); from z = -150 downwards p is 0, and the product 0 and not NaN."""
    z = tl.maximum(x * per_t[:, None], -150.0)
    return tl.exp(z - log_s[:, None]) * (slope[:, None] * z + offset[:, None])

"""Log-probability and entropy of tokens from vocabulary shards, bit-identical at every TP degree.

With z = (x - max x) / T and p = exp(z) / s, s = sum exp(z):

    log p(target) = z_target - log s
    H = log s - (1/s) sum exp(z) z         (nats)

The shifted form loses nothing to cancellation; `max + log s - sum p x` would cost 2.4e-5 nats at
a vocabulary of 151,936. The two sums are taken in 64-bit fixed point: every term is an integer
multiple of 2^-44 and integer addition is associative, so neither the number of shards nor the
order of the all-reduce changes a bit. Terms are at most 1 (exp) and 1/e (exp * z) in size, so
2^18 columns fit in 62 bits.

Shapes: T tokens, V columns of this rank's vocabulary shard, C columns that are no padding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_FIXED_POINT_ONE = float(2**44)
_MAX_VOCAB = 2**18
_CHUNK_ELEMENTS = 1 << 20
"""Rows are worked on in chunks of about this many logits, so temporaries stay in the cache."""


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
    tp_size = dist.get_world_size(tp_group) if tp_group is not None else 1
    total = logits_TV.shape[-1] * tp_size
    vocab_size = total if vocab_size is None else vocab_size
    if logits_TV.dim() != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"logits {list(logits_TV.shape)} and targets {list(targets_T.shape)} must be "
            "[T, V], [T]"
        )
    if not 0 < vocab_size <= min(total, _MAX_VOCAB):
        raise ValueError(
            f"vocab_size={vocab_size} must be in 1..{min(total, _MAX_VOCAB)} "
            f"({tp_size} shards of {logits_TV.shape[-1]} columns)"
        )
    if targets_T.numel() and not 0 <= int(targets_T.min()) <= int(targets_T.max()) < vocab_size:
        raise ValueError(
            f"targets span {int(targets_T.min())}..{int(targets_T.max())}, "
            f"outside the vocabulary of {vocab_size}"
        )
    temperature_T1 = _column(temperature, logits_TV)
    entropy_temperature_T1 = (
        None if entropy_temperature is None else _column(entropy_temperature, logits_TV)
    )
    return _LogprobAndEntropy.apply(
        logits_TV, targets_T, tp_group, temperature_T1, entropy_temperature_T1, vocab_size
    )


class _LogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, targets_T, tp_group, temperature_T1, entropy_temperature_T1, vocab):
        num_rows, width = logits_TV.shape
        first = width * (dist.get_rank(tp_group) if tp_group is not None else 0)
        num_columns = max(0, min(width, vocab - first))
        logits_TC = logits_TV.detach()[:, :num_columns]
        max_T1 = logits_TC.new_full((num_rows, 1), -torch.inf, dtype=torch.float32)
        if num_columns:
            max_T1 = logits_TC.amax(1, keepdim=True).float()
        # A MAX over ranks may lose a NaN, so it is counted; NaN becomes an integer nowhere.
        invalid_T = max_T1[:, 0].isnan()
        max_T1.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        _all_reduce(max_T1, dist.ReduceOp.MAX, tp_group)

        # Rows of `sums`: sum exp, sum exp * z, [both at the entropy's temperature], target logit,
        # ranks that hold a NaN.
        temperatures = [temperature_T1]
        if entropy_temperature_T1 is not None:
            temperatures.append(entropy_temperature_T1)
        sums = torch.zeros(2 * len(temperatures) + 2, num_rows, dtype=torch.int64)
        sums = sums.to(logits_TV.device)
        for rows in _row_chunks(num_rows, num_columns):
            shifted = logits_TC[rows].float() - max_T1[rows]
            for index, t in enumerate(temperatures):
                z = shifted / t[rows]
                e = z.exp()
                sums[2 * index, rows] = _fixed_point_sum(e)
                sums[2 * index + 1, rows] = _fixed_point_sum(e * z)
        sums[-1] = invalid_T
        owned_T = (targets_T >= first) & (targets_T < first + num_columns)
        local_T1 = torch.where(owned_T, targets_T - first, 0)[:, None]
        if num_columns:
            target_T = logits_TC.gather(1, local_T1)[:, 0].float()
            # The bits of the owner's float32 travel as an integer; all others add zero.
            sums[-2] = torch.where(owned_T, target_T.view(torch.int32).long(), 0)
        _all_reduce(sums, dist.ReduceOp.SUM, tp_group)

        target_T = sums[-2].int().view(torch.float32).double()
        z_target_T = (target_T - max_T1[:, 0].double()) / temperature_T1[:, 0].double()
        scaled = sums[:-2].double() / _FIXED_POINT_ONE
        # A row with a NaN, with +inf or with nothing but -inf has no distribution.
        scaled[:, (sums[-1] > 0) | max_T1[:, 0].isinf()] = torch.nan
        log_s_T = scaled[0].log()
        log_s_H_T = scaled[-2].log()
        logprobs_T = (z_target_T - log_s_T).float()
        entropy_T = (log_s_H_T - scaled[-1] / scaled[-2]).clamp_(min=0.0).float()
        ctx.save_for_backward(
            logits_TV, max_T1, log_s_T, log_s_H_T, entropy_T, owned_T, local_T1,
            temperature_T1, entropy_temperature_T1,
        )  # fmt: skip
        ctx.num_columns = num_columns
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        """d logp / dx_j = (1[j = target] - p_j) / T;  d H / dx_j = -p_j (log p_j + H) / T."""
        (
            logits_TV, max_T1, log_s_T, log_s_H_T, entropy_T, owned_T, local_T1,
            temperature_T1, entropy_temperature_T1,
        ) = ctx.saved_tensors  # fmt: skip
        grad_TV = torch.zeros_like(logits_TV)
        if grad_logprobs_T is None and grad_entropy_T is None:
            return grad_TV, None, None, None, None, None
        num_rows = logits_TV.shape[0]
        for rows in _row_chunks(num_rows, ctx.num_columns):
            shifted = logits_TV[rows, : ctx.num_columns].float() - max_T1[rows]
            grad = torch.zeros_like(shifted)
            if grad_logprobs_T is not None:
                t = temperature_T1[rows]
                upstream = grad_logprobs_T[rows, None] / t
                p = (shifted / t - log_s_T[rows, None].float()).exp_()
                grad -= p.mul_(upstream)
                grad.scatter_add_(1, local_T1[rows], owned_T[rows, None] * upstream)
            if grad_entropy_T is not None:
                t = temperature_T1 if entropy_temperature_T1 is None else entropy_temperature_T1
                log_p = shifted / t[rows] - log_s_H_T[rows, None].float()
                p = log_p.exp()
                term = p.mul_(log_p.add_(entropy_T[rows, None])).nan_to_num_(nan=0.0)
                grad -= term.mul_(grad_entropy_T[rows, None] / t[rows])
            grad_TV[rows, : ctx.num_columns] = grad.to(grad_TV.dtype)
        return grad_TV, None, None, None, None, None


def _fixed_point_sum(terms: Tensor) -> Tensor:
    """Row sums in units of 2^-44. Exact in float32: scaling by a power of two and rounding are.

    NaN counts as 0: it is the product of a probability 0 and its logarithm, or of a row that the
    caller declares invalid.
    """
    return (terms * _FIXED_POINT_ONE).round_().nan_to_num_(nan=0.0).long().sum(1)


def _row_chunks(num_rows: int, num_columns: int) -> list[slice]:
    if num_columns == 0:
        return []
    step = max(1, _CHUNK_ELEMENTS // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _column(temperature: float | Tensor, logits_TV: Tensor) -> Tensor:
    value = torch.as_tensor(temperature, dtype=torch.float32, device=logits_TV.device)
    if value.dim() == 1 and value.shape != logits_TV.shape[:1]:
        raise ValueError(f"temperature {list(value.shape)} must be a float or [T={len(logits_TV)}]")
    if value.numel() and not bool((value > 0).all()):
        raise ValueError(f"temperature must be positive, got {float(value.min())}")
    return value.expand(logits_TV.shape[0])[:, None]


def _all_reduce(
    tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)

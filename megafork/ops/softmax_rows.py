"""The softmax of rows that are spread over vocabulary shards: sums forward, gradients backward.

With z = (x - max x) / T and p = exp(z) / s, s = sum exp(z):

    log p(target) = z_target - log s
    H = log s - (1/s) sum exp(z) z         (nats)

The shifted form loses nothing to cancellation; `max + log s - sum p x` would cost 2.4e-5 nats at
a vocabulary of 151,936. The two sums are taken in 64-bit fixed point: every term is an integer
multiple of 2^-44 and integer addition is associative, so neither the number of shards nor the
order of the all-reduce changes a bit. Terms are at most 1 (exp) and 1/e (exp * z) in size, so
2^18 columns fit in 62 bits; rounding them moves a sum by at most 2^18 * 2^-45 = 7.5e-9.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FIXED_POINT_ONE = float(2**44)
_MAGIC = 1.5 * 2**8
"""Added to a term in float64 it leaves the term's fixed-point integer in the low bits: a float64
between 2^8 and 2^9 is a multiple of 2^-44."""
_MAGIC_BITS = struct.unpack("<q", struct.pack("<d", _MAGIC))[0]
_LOG2_E = math.log2(math.e)
_SMALLEST_Z = -150.0
"""exp is 0 in float32 from -104 downwards; exp * z would be NaN at -inf."""
_BLOCK = 1 << 17
"""Logits worked on at once by a thread, so that temporaries stay in the cache."""
_GPU_BLOCK = 1 << 22
_GRAIN = 1 << 15
"""torch gives a thread no less than so many elements of a pointwise operation."""
MIN_ROWS = 16
"""A product of fewer rows is padded: matrix libraries round products of one to three rows
differently, and a row's logits must not depend on how many others were selected."""
_SUMMED_AT_ONCE = 512
"""Features that threads of a CPU sum at once. Where several share a product, MKL sums 640 as one,
and 896 or more in pieces whose size depends on the number of rows."""


@dataclass(frozen=True)
class Shard:
    """This rank's columns: `first` is the global id of column 0, `num_columns` are no padding."""

    first: int
    num_columns: int

    @classmethod
    def of(cls, width: int, vocab_size: int, tp_group: dist.ProcessGroup | None) -> Shard:
        first = width * (dist.get_rank(tp_group) if tp_group is not None else 0)
        return cls(first, max(0, min(width, vocab_size - first)))


@dataclass
class Rows:
    """Maxima, sums and entropies of T rows over all shards: all that backward needs; no [T, V]."""

    shard: Shard
    targets_T: Tensor
    temperature_T1: Tensor
    entropy_temperature_T1: Tensor | None
    max_T1: Tensor
    log_s_T1: Tensor
    log_s_H_T1: Tensor
    entropy_T1: Tensor
    sums: Tensor | None = None
    """int64 [k, T]: sum exp, sum exp * z, [both at the entropy's temperature], the bits of the
    target's logit, how many ranks hold a NaN."""

    @classmethod
    def empty(
        cls, targets_T: Tensor, shard: Shard, temperature_T1: Tensor, entropy_T1: Tensor | None
    ) -> Rows:
        unknown = torch.zeros_like(temperature_T1)  # until finish()
        num_sums = 4 if entropy_T1 is None else 6
        sums = torch.zeros(num_sums, len(targets_T), dtype=torch.int64, device=targets_T.device)
        maximum = torch.full_like(temperature_T1, -torch.inf)
        return cls(
            shard, targets_T, temperature_T1, entropy_T1, maximum, unknown, unknown, unknown, sums
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.targets_T, self.temperature_T1, self.entropy_temperature_T1,
            self.max_T1, self.log_s_T1, self.log_s_H_T1, self.entropy_T1,
        )  # fmt: skip

    def find_max(self, logits: Tensor, rows: slice, tp_group: dist.ProcessGroup | None) -> None:
        """The rows' maximum over all shards; a NaN is counted, because a MAX may lose it."""
        assert self.sums is not None
        if self.shard.num_columns:
            local = logits.amax(1, keepdim=True).float()
            self.sums[-1, rows] = local[:, 0].isnan().long()
            local.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        else:
            local = torch.full_like(self.max_T1[rows], -torch.inf)
        all_reduce(local, dist.ReduceOp.MAX, tp_group)
        self.max_T1[rows] = local

    def add_up(self, logits: Tensor, rows: slice) -> None:
        """Add the rows' exponentials and their target logits, if they are ours, to the sums."""
        assert self.sums is not None
        temperatures = [self.temperature_T1]
        if self.entropy_temperature_T1 is not None:
            temperatures.append(self.entropy_temperature_T1)
        blocks = Blocks(logits, torch.float32, torch.float32, torch.float64)
        divide = [bool((t[rows] != 1).any()) for t in temperatures]
        for block, columns, (z, e, wide) in blocks:
            of_all = slice(rows.start + block.start, rows.start + block.stop)
            x, maximum, sums = logits[block, columns], self.max_T1[of_all], self.sums[:, of_all]
            for index, t in enumerate(temperatures):
                _shift(x, maximum, out=z)
                if divide[index]:
                    z.div_(t[of_all])
                z.clamp_(min=_SMALLEST_Z)
                _exp(*blocks.buffers)
                sums[2 * index].add_(_integers(e, wide).sum(1))
                sums[2 * index + 1].add_(_integers(e.mul_(z), wide).sum(1))
        exponents = logits.shape[1] * _MAGIC_BITS
        self.sums[:-2, rows] -= (exponents + 2**63) % 2**64 - 2**63
        if self.shard.num_columns:
            owned, local = self._targets(rows)
            target = logits.gather(1, local)[:, :1].float()
            # The bits of the owner's float32 travel as an integer; all others add zero.
            self.sums[-2, rows] = torch.where(owned, target.view(torch.int32).long(), 0)[:, 0]

    def finish(self, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, float32 [T], from the sums of all shards."""
        assert self.sums is not None
        all_reduce(self.sums, dist.ReduceOp.SUM, tp_group)
        target_T1 = self.sums[-2].int().view(torch.float32).double()[:, None]
        z_target_T1 = (target_T1 - self.max_T1.double()) / self.temperature_T1.double()
        scaled = self.sums[:-2].double() / FIXED_POINT_ONE
        # A row with a NaN, with +inf or with nothing but -inf has no distribution.
        scaled[:, (self.sums[-1] > 0) | self.max_T1[:, 0].isinf()] = torch.nan
        log_s_T1, log_s_H_T1 = scaled[0].log()[:, None], scaled[-2].log()[:, None]
        mean_z_T1 = (scaled[-1] / scaled[-2])[:, None]
        entropy_T1 = (log_s_H_T1 - mean_z_T1).clamp_(min=0.0).float()
        self.log_s_T1, self.log_s_H_T1 = log_s_T1.float(), log_s_H_T1.float()
        self.entropy_T1, self.sums = entropy_T1, None
        return (z_target_T1 - log_s_T1)[:, 0].float(), entropy_T1[:, 0].clone()

    def logits_gradient(
        self,
        logits: Tensor,
        rows: slice,
        grad_logprobs_T: Tensor | None,
        grad_entropy_T: Tensor | None,
        *,
        out: Tensor,
    ) -> None:
        """Write d/d logits into `out`, which may be `logits`; computed in float32.

        d logp/dx_j = (1[j = target] - p_j) / T, d H/dx_j = -p_j (log p_j + H) / T.
        """
        terms = self._gradient_terms(rows, grad_logprobs_T, grad_entropy_T)
        if not self.shard.num_columns or not terms:
            out.zero_()
            return
        owned, local = self._targets(rows)
        target = logits.gather(1, local)
        maximum = self.max_T1[rows]
        for block, columns, (z, e, *total) in Blocks(logits, *[torch.float32] * (1 + len(terms))):
            x, result = logits[block, columns], out[block, columns]
            first = terms[0].factors(x, maximum[block], block, z, e)
            torch.mul(*first, out=total[0] if total else result)
            for term in terms[1:]:
                total[0].addcmul_(*term.factors(x, maximum[block], block, z, e))
                result.copy_(total[0])
        # The target's 1 - p in float32, before it is rounded to what `out` is.
        grad, z, e = torch.zeros(3, *target.shape, device=target.device)
        for term in terms:
            grad.addcmul_(*term.factors(target, maximum, slice(None), z, e))
        if grad_logprobs_T is not None:
            grad += grad_logprobs_T[rows, None] / self.temperature_T1[rows]
        out.scatter_(1, local, torch.where(owned, grad.to(out.dtype), out.gather(1, local)))

    def _gradient_terms(
        self, rows: slice, grad_logprobs_T: Tensor | None, grad_entropy_T: Tensor | None
    ) -> list[_GradientTerm]:
        """Return the terms of the logits' gradient: one where both outputs have one temperature or
        one of them has no gradient, else two."""
        t, t_H = self.temperature_T1[rows], self.entropy_temperature_T1
        terms = []
        if grad_entropy_T is not None:
            t_H = t if t_H is None else t_H[rows]
            term = _GradientTerm(t_H, self.log_s_H_T1[rows])
            term.slope_T1 = -grad_entropy_T[rows, None] / t_H
            term.offset_T1 += term.slope_T1 * (self.entropy_T1[rows] - self.log_s_H_T1[rows])
            terms.append(term)
        if grad_logprobs_T is not None:
            if not terms or self.entropy_temperature_T1 is not None:
                terms.append(_GradientTerm(t, self.log_s_T1[rows]))
            terms[-1].offset_T1 -= grad_logprobs_T[rows, None] / t
        return terms

    def _targets(self, rows: slice) -> tuple[Tensor, Tensor]:
        """([rows, 1] whether the target is in this shard, its column here or 0)."""
        column = self.targets_T[rows, None] - self.shard.first
        owned = (column >= 0) & (column < self.shard.num_columns)
        return owned, torch.where(owned, column, 0)


class _GradientTerm:
    """p (slope z + offset) at every logit, p = exp(z - log s)."""

    def __init__(self, temperature_T1: Tensor, log_s_T1: Tensor):
        self.temperature_T1 = temperature_T1 if bool((temperature_T1 != 1).any()) else None
        self.minus_log2_s_T1 = log_s_T1 * -_LOG2_E
        self.offset_T1 = torch.zeros_like(log_s_T1)
        self.slope_T1: Tensor | None = None

    def factors(
        self, x: Tensor, maximum: Tensor, block: slice, z: Tensor, e: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(p, slope z + offset) of some rows; z and e are overwritten."""
        _shift(x, maximum, out=z)
        if self.temperature_T1 is not None:
            z.div_(self.temperature_T1[block])
        torch.add(self.minus_log2_s_T1[block], z, alpha=_LOG2_E, out=e).exp2_()
        if self.slope_T1 is None:
            return e, self.offset_T1[block]
        z.clamp_(min=_SMALLEST_Z).mul_(self.slope_T1[block])
        return e, z.add_(self.offset_T1[block])


class Blocks:
    """Iterates over [rows, columns] in blocks: (slice, slice, temporaries of that shape).

    torch's CPU loops leave the last few elements of each thread's share to scalar code, which
    rounds exp2 differently. Buffers end such that no share has any left: then an exp2 over a whole
    buffer depends neither on where a logit lies in it nor on the number of threads.
    """

    def __init__(self, logits: Tensor, *dtypes: torch.dtype):
        self.num_rows, self.num_columns = logits.shape
        threads = torch.get_num_threads() if logits.device.type == "cpu" else 1
        size = _GPU_BLOCK if logits.is_cuda else _BLOCK * threads  # meta: as one thread of a CPU
        across = -(-self.num_columns // size) or 1
        self.width = -(-self.num_columns // across) or 1
        self.height = max(1, min(size // self.width, self.num_rows))
        length = self.height * self.width
        shares = max(1, min(threads, -(-length // _GRAIN)))
        length += -length % (128 * shares)
        self.buffers = [torch.zeros(length, dtype=d, device=logits.device) for d in dtypes]

    def __iter__(self) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        shape, views = (0, 0), list[Tensor]()
        for rows in slices(self.num_rows, self.height):
            for columns in slices(self.num_columns, self.width):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                if shape != (height, width):
                    shape = height, width
                    views = [b[: height * width].view(shape) for b in self.buffers]
                yield rows, columns, views


def _shift(x: Tensor, maximum: Tensor, *, out: Tensor) -> None:
    """x - maximum, before any temperature: the other order loses bits where x is far from 0."""
    if x.dtype == torch.float32:
        torch.sub(x, maximum, out=out)
    else:
        out.copy_(x).sub_(maximum)


def _exp(z: Tensor, e: Tensor, wide: Tensor) -> None:
    """e = exp(z) by 2^(z log2 e), which torch computes four times faster on a CPU; whole buffers.

    At z = -16 the product is rounded by up to 1e-6, and a thousand logits may share that error. A
    fused multiply-add, which is what `alpha` gives, finds it; where it is not fused it finds zero.
    """
    torch.mul(z, _LOG2_E, out=e)
    rounding = torch.sub(e, z, alpha=_LOG2_E, out=wide.view(torch.float32)[: len(z)])
    e.exp2_().addcmul_(e, rounding, value=-math.log(2))


def _integers(terms: Tensor, wide: Tensor) -> Tensor:
    """Terms in units of 2^-44, rounded to nearest, each with _MAGIC_BITS added to it.

    Sums of these wrap around 2^64, as often as they do when the bits are taken off again.
    """
    return wide.copy_(terms).add_(_MAGIC).view(torch.int64)


def product(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """float32 hidden @ weight.T, in `buffer`; a row's bits do not depend on the number of rows.

    They do on the number of threads: whether it is 1.
    """
    num_rows, num_features = hidden.shape
    padded = hidden.float()
    if num_rows < MIN_ROWS:
        padded = torch.cat([padded, padded.new_zeros(MIN_ROWS - num_rows, num_features)])
    shared = not hidden.is_cuda and torch.get_num_threads() > 1
    first, *others = slices(num_features, _SUMMED_AT_ONCE if shared else num_features)
    for tile in tiles(weight):
        columns, out = weight[tile].float().T, buffer[: len(padded), tile]
        torch.mm(padded[:, first], columns[first], out=out)
        for features in others:
            out.addmm_(padded[:, features], columns[features])
    return buffer[:num_rows]


def tiles(weight: Tensor) -> list[slice]:
    """Rows of a weight that are cast to float32 at once: all of them when nothing is cast."""
    rows = len(weight) if weight.dtype == torch.float32 else 8192
    return slices(len(weight), max(rows, 1))


def slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def all_reduce(
    tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)

"""The softmax of rows that are spread over vocabulary shards: sums forward, gradients backward.

With z = (x - max x) / T and p = exp(z) / s, s = sum exp(z):

    log p(target) = z_target - log s
    H = log s - (1/s) sum exp(z) z         (nats)

The shifted form loses nothing to cancellation; `max + log s - sum p x` would cost 2.4e-5 nats at
a vocabulary of 151,936. The two sums are taken in 64-bit fixed point: every term is an integer
multiple of 2^-44 and integer addition is associative, so neither the number of shards nor the
order of the all-reduce changes a bit. Terms are at most 1 (exp) and 1/e (exp * z) in size, so
2^18 columns fit in 62 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_FIXED_POINT_ONE = float(2**44)
_CACHED_LOGITS = 1 << 17
"""Rows are worked on in pieces of about this many logits, so temporaries stay in the cache."""
MIN_ROWS = 16
"""A product of fewer rows is padded: matrix libraries round products of one to three rows
differently, and a row's logits must not depend on how many others were selected."""


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
    """What forward finds out about T rows over all shards and backward needs; no [T, V]."""

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
        for piece in pieces(len(logits), self.shard.num_columns):
            of_all = slice(rows.start + piece.start, rows.start + piece.stop)
            shifted = logits[piece].float() - self.max_T1[of_all]
            for index, t in enumerate(temperatures):
                z = shifted / t[of_all]
                e = z.exp()
                self.sums[2 * index, of_all] = _fixed_point_sum(e)
                self.sums[2 * index + 1, of_all] = _fixed_point_sum(e.mul_(z))
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
        scaled = self.sums[:-2].double() / _FIXED_POINT_ONE
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
    ) -> Tensor:
        """float32: d logp/dx_j = (1[j = target] - p_j) / T, d H/dx_j = -p_j (log p_j + H) / T."""
        shifted = logits.float() - self.max_T1[rows]
        grad = torch.zeros_like(shifted)
        if grad_entropy_T is not None:
            t = (
                self.temperature_T1
                if self.entropy_temperature_T1 is None
                else (self.entropy_temperature_T1)
            )
            log_p = shifted / t[rows] - self.log_s_H_T1[rows]
            term = log_p.exp().mul_(log_p.add_(self.entropy_T1[rows])).nan_to_num_(nan=0.0)
            grad.addcmul_(term, grad_entropy_T[rows, None] / t[rows], value=-1.0)
        if grad_logprobs_T is not None:
            upstream = grad_logprobs_T[rows, None] / self.temperature_T1[rows]
            log_p = (shifted / self.temperature_T1[rows]).sub_(self.log_s_T1[rows])
            grad.addcmul_(log_p.exp_(), upstream, value=-1.0)
            owned, local = self._targets(rows)
            grad.scatter_add_(1, local, owned * upstream)
        return grad

    def _targets(self, rows: slice) -> tuple[Tensor, Tensor]:
        """([rows, 1] whether the target is in this shard, its column here or 0)."""
        column = self.targets_T[rows, None] - self.shard.first
        owned = (column >= 0) & (column < self.shard.num_columns)
        return owned, torch.where(owned, column, 0)


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """float32 hidden @ weight.T; a row's bits do not depend on the number of rows."""
    num_rows = len(hidden)
    padded = hidden.float()
    if num_rows < MIN_ROWS:
        padded = torch.cat([padded, padded.new_zeros(MIN_ROWS - num_rows, padded.shape[1])])
    if weight.dtype == torch.float32:
        return (padded @ weight.T)[:num_rows]
    logits = padded.new_empty(len(padded), len(weight))
    for tile in tiles(weight):
        logits[:, tile] = padded @ weight[tile].float().T
    return logits[:num_rows]


def tiles(weight: Tensor) -> list[slice]:
    """Rows of a weight that are cast to float32 at once: all of them when nothing is cast."""
    rows = len(weight) if weight.dtype == torch.float32 else 8192
    return slices(len(weight), max(rows, 1))


def pieces(num_rows: int, num_columns: int) -> list[slice]:
    return slices(num_rows, max(1, _CACHED_LOGITS // num_columns)) if num_columns else []


def slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _fixed_point_sum(terms: Tensor) -> Tensor:
    """Row sums in units of 2^-44. Exact in float32: scaling by a power of two and rounding are.

    NaN counts as 0: it is the product of a probability 0 and its logarithm, or of a row that the
    caller declares invalid.
    """
    return (terms * _FIXED_POINT_ONE).round_().nan_to_num_(nan=0.0).long().sum(1)


def all_reduce(
    tensor: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)

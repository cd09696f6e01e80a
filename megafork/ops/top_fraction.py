"""The exact k-th largest of values that are spread over ranks, by radix selection.

float32 values map to 32-bit keys of the same order. Three passes count the keys' leading 11, next
11 and last 10 bits in histograms, which are summed over the ranks; each pass narrows the k-th
largest down to one bin, the last to one key. Communication does not depend on the number of
values, counts are 64-bit integers, and nothing is ever gathered or sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_PASSES = ((21, 11), (10, 11), (0, 10))  # (bits below, bits of this pass)


class TopFraction(NamedTuple):
    threshold: float | Tensor
    """The k-th largest value; +inf where there is no value at all."""
    num_kept: int | Tensor
    """Values at or above the threshold: k, and more when values are tied with it."""
    num_total: int | Tensor


def top_fraction_threshold(
    values_T: Tensor,
    mask_T: Tensor,
    fraction: float,
    *,
    groups: Sequence[dist.ProcessGroup] = (),
    segments_T: Tensor | None = None,
    num_segments: int = 1,
) -> TopFraction:
    """Threshold of the top `fraction` of the masked values over all ranks.

    values_T: float32 (bfloat16 and float16 are exact too). mask_T: bool. The threshold is exactly
    the k-th largest masked value, k = ceil(fraction * N - 1e-9), at least 1; all values tied with
    it are kept.
    groups: orthogonal process groups over which the tokens are split. segments_T: ids in
    0..num_segments-1, one independent threshold each, with the same three collectives.

    Returns Python numbers, or [num_segments] tensors (float32, int64, int64) when segments_T is
    given. Raises ValueError, on every rank, naming the ranks that hold NaN and how many.
    """
    _check_arguments(values_T, mask_T, fraction)
    device = values_T.device
    mask_T = mask_T.bool()
    values = values_T.detach()[mask_T].float()
    segments = (
        torch.zeros_like(values, dtype=torch.int64)
        if segments_T is None
        else segments_T[mask_T].long()
    )
    _refuse_nan(values, groups)
    keys = _ordered_keys(values)

    prefix = torch.zeros(num_segments, dtype=torch.int64, device=device)
    above = torch.zeros_like(prefix)  # values in bins above the chosen one
    remaining = total = in_bin = above
    for index, (shift, bits) in enumerate(_PASSES):
        bins = 1 << bits
        alive = (keys >> (shift + bits)) == prefix[segments]
        slot = segments[alive] * bins + ((keys[alive] >> shift) & (bins - 1))
        histogram = torch.bincount(slot, minlength=num_segments * bins)
        for group in groups:
            dist.all_reduce(histogram, group=group)
        histogram = histogram.view(num_segments, bins)
        if index == 0:
            total = histogram.sum(1)
            remaining = _rank_from_top(total, fraction)
        from_top = histogram.flip(1).cumsum(1)
        chosen = (from_top < remaining[:, None]).sum(1).clamp_(max=bins - 1)
        in_bin = histogram.flip(1).gather(1, chosen[:, None])[:, 0]
        passed = from_top.gather(1, chosen[:, None])[:, 0] - in_bin
        above, remaining = above + passed, remaining - passed
        prefix = (prefix << bits) | (bins - 1 - chosen)
    threshold = torch.where(total > 0, _values_of_keys(prefix), torch.inf)
    num_kept = torch.where(total > 0, above + in_bin, 0)
    if segments_T is None:
        return TopFraction(threshold.item(), int(num_kept), int(total))
    return TopFraction(threshold, num_kept, total)


def _check_arguments(values_T: Tensor, mask_T: Tensor, fraction: float) -> None:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction={fraction} must be in (0, 1]")
    if values_T.shape != mask_T.shape or values_T.dtype == torch.float64:
        raise ValueError(
            f"values {list(values_T.shape)} ({values_T.dtype}) and mask {list(mask_T.shape)} must "
            "be of one shape, values at most float32"
        )


def _rank_from_top(total: Tensor, fraction: float) -> Tensor:
    ks = [max(1, math.ceil(fraction * n - 1e-9)) for n in total.tolist()]
    return torch.tensor(ks, dtype=torch.int64, device=total.device)


def _ordered_keys(values: Tensor) -> Tensor:
    """int64 in 0..2^32-1, in the order of the floats; adding zero turns -0 into +0."""
    bits = (values + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits | (1 << 31)) & 0xFFFFFFFF


def _values_of_keys(keys: Tensor) -> Tensor:
    bits = torch.where(keys >> 31 == 1, keys & 0x7FFFFFFF, ~keys)
    return bits.int().view(torch.float32)


def _refuse_nan(values: Tensor, groups: Sequence[dist.ProcessGroup]) -> None:
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    counts = torch.zeros(world, dtype=torch.int64, device=values.device)
    counts[rank] = values.isnan().sum()
    for group in groups:
        dist.all_reduce(counts, group=group)
    if counts.any():
        where = ", ".join(f"rank {r}: {n}" for r, n in enumerate(counts.tolist()) if n)
        raise ValueError(f"NaN among the values ({where})")

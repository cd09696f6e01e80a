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
    values = values_T.detach()[mask_T.bool()].float()
    segments = None if segments_T is None else segments_T[mask_T.bool()].long()
    _refuse_nan(values, groups)
    keys = _ordered_keys(values)

    prefix = keys.new_zeros(num_segments, dtype=torch.int64)
    above = torch.zeros_like(prefix)  # values in bins above the chosen one
    remaining = total = in_bin = above
    for index, (shift, bits) in enumerate(_PASSES):
        histogram = _histogram(keys, segments, shift, bits, num_segments, groups)
        if index == 0:
            total = histogram.sum(1)
            remaining = _rank_from_top(total, fraction)
        from_top = histogram.flip(1).cumsum(1)
        chosen = (from_top < remaining[:, None]).sum(1).clamp_(max=histogram.shape[1] - 1)
        in_bin = histogram.flip(1).gather(1, chosen[:, None])[:, 0]
        passed = from_top.gather(1, chosen[:, None])[:, 0] - in_bin
        above, remaining = above + passed, remaining - passed
        # The keys' leading bits are signed: bin 0 of the first pass is -2^10.
        first_bin = -(1 << (bits - 1)) if index == 0 else 0
        prefix = (prefix << bits) + (histogram.shape[1] - 1 - chosen) + first_bin
        # Only what shares the chosen bins can hold the k-th largest.
        alive = (keys >> shift) == (prefix.int() if segments is None else prefix.int()[segments])
        keys, segments = keys[alive], None if segments is None else segments[alive]
    threshold = torch.where(total > 0, _values_of_keys(prefix.int()), torch.inf)
    num_kept = torch.where(total > 0, above + in_bin, 0)
    if segments_T is None:
        return TopFraction(threshold.item(), int(num_kept), int(total))
    return TopFraction(threshold, num_kept, total)


def _histogram(
    keys: Tensor,
    segments: Tensor | None,
    shift: int,
    bits: int,
    num_segments: int,
    groups: Sequence[dist.ProcessGroup],
) -> Tensor:
    """int64 [num_segments, 2^bits] over all ranks: keys by `bits` bits above `shift`."""
    bins = 1 << bits
    # Flipping the sign bit turns signed order into unsigned order; it is in the first pass alone.
    slots = ((keys >> shift) + (bins // 2 if shift + bits == 32 else 0)) & (bins - 1)
    if segments is not None:
        slots = slots + segments * bins
    histogram = torch.bincount(slots, minlength=num_segments * bins)
    for group in groups:
        dist.all_reduce(histogram, group=group)
    return histogram.view(num_segments, bins)


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
    """int32 in the order of the floats; adding zero turns -0 into +0."""
    return _flip_negatives((values + 0.0).view(torch.int32))


def _values_of_keys(keys: Tensor) -> Tensor:
    return _flip_negatives(keys).view(torch.float32)


def _flip_negatives(bits: Tensor) -> Tensor:
    """Negative floats grow downwards in their bits: turn theirs round. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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

"""The exact k-th largest of values that are spread over ranks, by radix selection.

float32 values map to 32-bit keys of the same order. Each pass counts some leading bits of the keys
in histograms, which are summed over the ranks, and narrows the k-th largest down to one bin; the
last pass leaves one key. Communication does not depend on the number of values, counts are 64-bit
integers, and nothing is ever gathered or sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_MAX_BITS = 11
_MAX_BINS = 1 << 17
"""Of one pass over all segments: 1 MiB of counts."""


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
    the k-th largest masked value, k = top_k(N, fraction); all values tied with it are kept.
    groups: orthogonal process groups over which the tokens are split. segments_T: ids in
    0..num_segments-1, one independent threshold each, all with the same collectives: for each
    group one small one that counts faults and three histograms of together 40 KiB; with more than
    64 segments more of them, each of 1 MiB at most up to 65,536 segments.

    Returns Python numbers, or [num_segments] tensors (float32, int64, int64) when segments_T is
    given. Raises ValueError, on every rank, naming the ranks that hold NaN, or segments that there
    are not, and how many.
    """
    _check_arguments(values_T, mask_T, fraction)
    values = values_T.detach()[mask_T.bool()].float()
    segments = None if segments_T is None else segments_T[mask_T.bool()].long()
    _refuse_what_one_rank_has(values, segments, num_segments, groups)
    found = _radix_select(
        _ordered_keys(values), segments, num_segments, groups, lambda n: top_k(n, fraction)
    )
    threshold = torch.where(found.total > 0, _values_of_keys(found.key.int()), torch.inf)
    num_kept = torch.where(found.total > 0, found.above + found.equal, 0)
    if segments_T is None:
        return TopFraction(threshold.item(), int(num_kept), int(found.total))
    return TopFraction(threshold, num_kept, found.total)


def top_k(num_values: Tensor, fraction: float) -> Tensor:
    """int64: ceil(fraction * n - 1e-9), at least 1.

    In rational numbers: 0.1 of 30 is 3 and 0.14 of 164,000,000 is 22,960,000, whatever 0.1 and 0.14
    are in binary.
    """
    exact, slack = Fraction(str(fraction)), Fraction(1, 10**9)
    ks = [max(1, math.ceil(exact * n - slack)) for n in num_values.tolist()]
    return torch.tensor(ks, dtype=torch.int64, device=num_values.device)


def largest_keys(
    keys_T: Tensor,
    mask_T: Tensor,
    k_S: Tensor,
    *,
    groups: Sequence[dist.ProcessGroup] = (),
    segments_T: Tensor,
) -> Tensor:
    """bool [T]: the k_S[s] largest masked keys of every segment s over all ranks.

    keys_T: int64, all different, so exactly k are chosen. k_S: int64 [S], the same on all ranks, at
    most the number of masked keys; 0 is legal. segments_T: int64 [T].
    """
    keys, segments = keys_T[mask_T], segments_T[mask_T]
    found = _radix_select(keys, segments, len(k_S), groups, lambda _: k_S.clamp(min=1))
    enough = (keys_T >= found.key[segments_T]) & (k_S > 0)[segments_T]
    return mask_T & enough


class _Found(NamedTuple):
    """The k-th largest key of every segment, and the number of keys about it; all int64 [S]."""

    key: Tensor
    """the k-th largest"""
    above: Tensor
    """keys above it"""
    equal: Tensor
    """keys equal to it"""
    total: Tensor


def _radix_select(
    keys: Tensor,
    segments: Tensor | None,
    num_segments: int,
    groups: Sequence[dist.ProcessGroup],
    k_of: Callable[[Tensor], Tensor],
) -> _Found:
    """The k-th largest of int32 or int64 keys, k = k_of(number of keys), in every segment."""
    num_bits = torch.iinfo(keys.dtype).bits
    prefix = keys.new_zeros(num_segments, dtype=torch.int64)
    above = torch.zeros_like(prefix)  # keys in bins above the chosen one
    remaining = total = in_bin = above
    for shift, bits in _passes(num_bits, num_segments):
        first = shift + bits == num_bits
        histogram = _histogram(keys, segments, shift, bits, num_segments, groups)
        if first:
            total = histogram.sum(1)
            remaining = k_of(total)
        from_top = histogram.flip(1).cumsum(1)
        chosen = (from_top < remaining[:, None]).sum(1).clamp_(max=histogram.shape[1] - 1)
        in_bin = histogram.flip(1).gather(1, chosen[:, None])[:, 0]
        passed = from_top.gather(1, chosen[:, None])[:, 0] - in_bin
        above, remaining = above + passed, remaining - passed
        # The keys' leading bits are signed: bin 0 of the first pass is the most negative.
        first_bin = -(1 << (bits - 1)) if first else 0
        prefix = (prefix << bits) + (histogram.shape[1] - 1 - chosen) + first_bin
        # Only what shares the chosen bins can hold the k-th largest.
        wanted = prefix.to(keys.dtype)
        alive = (keys >> shift) == (wanted if segments is None else wanted[segments])
        keys, segments = keys[alive], None if segments is None else segments[alive]
    return _Found(prefix, above, in_bin, total)


def _passes(num_bits: int, num_segments: int) -> Iterator[tuple[int, int]]:
    """(bits below, bits of this pass), from the leading bits down, within _MAX_BINS in all."""
    width = max(1, min(_MAX_BITS, int(math.log2(_MAX_BINS / num_segments))))
    shift = num_bits
    while shift:
        bits = min(width, shift)
        shift -= bits
        yield shift, bits


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
    leading = shift + bits == torch.iinfo(keys.dtype).bits
    slots = ((keys >> shift) + (bins // 2 if leading else 0)) & (bins - 1)
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


def _ordered_keys(values: Tensor) -> Tensor:
    """int32 in the order of the floats; adding zero turns -0 into +0."""
    return _flip_negatives((values + 0.0).view(torch.int32))


def _values_of_keys(keys: Tensor) -> Tensor:
    return _flip_negatives(keys).view(torch.float32)


def _flip_negatives(bits: Tensor) -> Tensor:
    """Negative floats grow downwards in their bits: turn theirs round. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _refuse_what_one_rank_has(
    values: Tensor,
    segments: Tensor | None,
    num_segments: int,
    groups: Sequence[dist.ProcessGroup],
) -> None:
    """Raise ValueError on every rank for what any rank holds.

    Faults are counted over all ranks first: one that raised alone would leave the others waiting.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    counts = torch.zeros(2, world, dtype=torch.int64, device=values.device)
    counts[0, rank] = values.isnan().sum()
    if segments is not None:
        counts[1, rank] = ((segments < 0) | (segments >= num_segments)).sum()
    for group in groups:
        dist.all_reduce(counts, group=group)
    names = ("NaN among the values", f"segments outside 0..{num_segments - 1}")
    for name, of_ranks in zip(names, counts.tolist(), strict=True):
        where = ", ".join(f"rank {r}: {n}" for r, n in enumerate(of_ranks) if n)
        if where:
            raise ValueError(f"{name} ({where})")

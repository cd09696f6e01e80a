"""Exact order statistics of values that do not fit in memory.

Two passes over float32 values, by their bits in an order that is the values' own: the first counts
the upper 20 bits, the second the lower 12 of those cells that hold a wanted rank. Nothing is
approximated, ties included; memory is 8 MiB and 32 KiB for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy

_LOW_BITS = 12
_CELLS = 1 << (32 - _LOW_BITS)
_LOW = 1 << _LOW_BITS
_SIGN = numpy.uint32(1 << 31)

Blocks = Callable[[], Iterable[numpy.ndarray]]
"""Called for each pass; float32 arrays without NaN."""


def order_statistics(blocks: Blocks, ranks: Sequence[int]) -> numpy.ndarray:
    """float32: for each rank r the value that r others precede in ascending order.

    Raises ValueError for a rank that is not among 0 .. n - 1.
    """
    counts = numpy.zeros(_CELLS, numpy.int64)
    for values in blocks():
        counts += numpy.bincount(_ordered(values) >> _LOW_BITS, minlength=_CELLS)
    below = numpy.cumsum(counts)  # values in this cell and before
    wanted = numpy.asarray(ranks, numpy.int64)
    if len(wanted) and not (wanted.min() >= 0 and wanted.max() < below[-1]):
        raise ValueError(f"ranks {wanted.min()} to {wanted.max()} of {below[-1]} values")
    cell_of = numpy.searchsorted(below, wanted, side="right")
    cells, slot_of = numpy.unique(cell_of, return_inverse=True)
    slots = numpy.full(_CELLS, -1, numpy.int32)
    slots[cells] = numpy.arange(len(cells))
    inside = numpy.zeros(len(cells) * _LOW, numpy.int64)
    for values in blocks():
        bits = _ordered(values)
        slot = slots[bits >> _LOW_BITS]
        here = slot >= 0
        index = slot[here].astype(numpy.int64) * _LOW + (bits[here] & (_LOW - 1))
        inside += numpy.bincount(index, minlength=len(inside))
    upto = inside.reshape(len(cells), _LOW).cumsum(axis=1)
    before = below[cells] - counts[cells]
    low = [
        numpy.searchsorted(upto[slot], rank - before[slot], side="right")
        for rank, slot in zip(wanted, slot_of, strict=True)
    ]
    return _values((cell_of << _LOW_BITS | numpy.array(low, numpy.int64)).astype(numpy.uint32))


def quantiles(blocks: Blocks, num_values: int, fractions: Sequence[float]) -> numpy.ndarray:
    """float64: numpy.quantile's default (linear between two order statistics) of all values."""
    at = (num_values - 1) * numpy.asarray(fractions, numpy.float64)
    lower = numpy.floor(at).astype(numpy.int64)
    upper = numpy.minimum(lower + 1, num_values - 1)
    found = order_statistics(blocks, [*lower, *upper]).astype(numpy.float64)
    low, high = found[: len(at)], found[len(at) :]
    return low + (high - low) * (at - lower)


def _ordered(values: numpy.ndarray) -> numpy.ndarray:
    """uint32, in the values' order; -0.0 comes before 0.0, which it equals."""
    bits = values.view(numpy.uint32)
    return numpy.where(bits & _SIGN, ~bits, bits | _SIGN)


def _values(ordered: numpy.ndarray) -> numpy.ndarray:
    """The inverse."""
    bits = numpy.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered)
    return bits.astype(numpy.uint32).view(numpy.float32)

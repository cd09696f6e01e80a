"""Exact order statistics, and means of tokens in cells with standard errors over responses.

A cell is a token id or a bin of entropy.
Tokens of one response are not independent, responses nearly are (those to one prompt are not
quite). So the error is the cluster-robust one: with S_r the sum and n_r the count of response r in
a cell, m the mean and R the responses that have a token there,

    se^2 = R / (R - 1) * sum_r (S_r - m n_r)^2 / (sum_r n_r)^2

With one token in each response it is the usual s / sqrt(n). Two responses at least, or NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

Array = numpy.ndarray


def order_statistics(values: Array, ranks: Sequence[int]) -> Array:
    """float32: for each rank r of 0 .. n - 1 the value that r others precede in ascending order."""
    return numpy.partition(values, sorted(set(ranks)))[ranks]


def quantiles(values: Array, fractions: Sequence[float]) -> Array:
    """float64: numpy.quantile's default (linear between two order statistics), in float64."""
    at = (len(values) - 1) * numpy.asarray(fractions, numpy.float64)
    lower = numpy.floor(at).astype(numpy.int64)
    upper = numpy.minimum(lower + 1, len(values) - 1)
    found = order_statistics(values, [*lower, *upper]).astype(numpy.float64)
    low, high = found[: len(at)], found[len(at) :]
    return low + (high - low) * (at - lower)


class ClusteredMeans:
    """Sums of `num_cells` cells, in float64; memory does not depend on the tokens."""

    def __init__(self, num_cells: int) -> None:
        self.count = numpy.zeros(num_cells, numpy.int64)
        self.num_responses = numpy.zeros(num_cells, numpy.int64)
        self._sum = numpy.zeros(num_cells)
        self._squares = numpy.zeros((3, num_cells))  # of sum_r: S_r^2, S_r n_r, n_r^2

    def add(self, value_T: Array, cell_T: Array, row_T: Array) -> None:
        """A block of whole responses: a response's tokens all come in one call."""
        if not len(value_T):
            return
        num_cells, first = len(self.count), row_T.min()
        key_T = (row_T - first) * num_cells + cell_T
        num_pairs = int(row_T.max() - first + 1) * num_cells
        if num_pairs <= 4 * len(key_T):
            count_K, sum_K = numpy.bincount(key_T), numpy.bincount(key_T, value_T)
            pair_P = count_K.nonzero()[0]
            count_P, sum_P = count_K[pair_P], sum_K[pair_P]
        else:  # a vocabulary for each response: only those pairs that there are
            pair_P, of_T, count_P = numpy.unique(key_T, return_inverse=True, return_counts=True)
            sum_P = numpy.bincount(of_T, value_T)
        cell_P = pair_P % num_cells

        def by_cell(weight_P: Array) -> Array:
            return numpy.bincount(cell_P, weight_P, minlength=num_cells)

        self.count += numpy.bincount(cell_T, minlength=num_cells)
        self.num_responses += numpy.bincount(cell_P, minlength=num_cells)
        self._sum += by_cell(sum_P)
        for i, product_P in enumerate((sum_P**2, sum_P * count_P, count_P.astype(float) ** 2)):
            self._squares[i] += by_cell(product_P)

    @property
    def mean(self) -> Array:
        """float64; NaN in an empty cell"""
        return self._sum / numpy.where(self.count > 0, self.count, numpy.nan)

    @property
    def standard_error(self) -> Array:
        """float64; NaN where fewer than two responses have a token"""
        enough = self.num_responses > 1
        mean = numpy.where(enough, self.mean, numpy.nan)
        ss, sn, nn = self._squares
        # Below 0 by rounding where all values are equal.
        residual = numpy.maximum(ss - 2 * mean * sn + mean**2 * nn, 0.0)
        responses = numpy.where(enough, self.num_responses, 2)
        factor = responses / (responses - 1)
        return numpy.sqrt(factor * residual) / numpy.where(enough, self.count, numpy.nan)

"""Means of tokens in cells, with standard errors over responses.

A cell is a token id or a bin of entropy.
Tokens of one response are not independent, responses nearly are (those to one prompt are not
quite). So the error is the cluster-robust one: with S_r the sum and n_r the count of response r in
a cell, m the mean and R the responses that have a token there,

    se^2 = R / (R - 1) * sum_r (S_r - m n_r)^2 / (sum_r n_r)^2

With one token in each response it is the usual s / sqrt(n). Two responses at least, or NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

Array = numpy.ndarray


@dataclass(frozen=True)
class CellMeans:
    """Statistics of each cell; `mean` is NaN in an empty one."""

    count: Array
    """int64, tokens"""
    num_responses: Array
    """int64, responses that have a token in the cell"""
    mean: Array
    """float64"""
    standard_error: Array
    """float64; NaN where fewer than two responses have a token"""


def clustered_means(value_T: Array, cell_T: Array, response_T: Array, num_cells: int) -> CellMeans:
    """Mean of the values in each cell, summed in float64, with its standard error.

    cell_T: integers, 0 .. num_cells - 1. response_T: integers, the response of each token.
    """
    import pyarrow

    # One row P for each pair of response and cell that there is.
    table = pyarrow.table({"response": response_T, "cell": cell_T, "value": value_T})
    pairs = table.group_by(["response", "cell"], use_threads=False).aggregate(
        [("value", "sum"), ("value", "count")]
    )
    cell_P, sum_P, count_P = (
        pairs[name].to_numpy() for name in ("cell", "value_sum", "value_count")
    )

    def by_cell(weight_P: Array) -> Array:
        return numpy.bincount(cell_P, weight_P, minlength=num_cells)

    count, num_responses = by_cell(count_P), numpy.bincount(cell_P, minlength=num_cells)
    mean = by_cell(sum_P) / numpy.where(count > 0, count, numpy.nan)
    squares = by_cell((sum_P - mean[cell_P] * count_P) ** 2)
    enough = num_responses > 1
    factor = num_responses / numpy.where(enough, num_responses - 1, 1)
    error = numpy.sqrt(factor * squares) / numpy.where(enough, count, numpy.nan)
    return CellMeans(count.astype(numpy.int64), num_responses, mean, error)


def overall_mean(value_T: Array, response_T: Array) -> tuple[float, float]:
    """Mean of all values, and its standard error."""
    one_T = numpy.zeros(len(value_T), numpy.int8)
    found = clustered_means(value_T, one_T, response_T, 1)
    return float(found.mean[0]), float(found.standard_error[0])

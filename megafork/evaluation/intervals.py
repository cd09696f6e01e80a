"""The 95% interval of a share: for the mean accuracy of new problems of the kind.

A problem's number lies between 0 and 1. n problems with mean m and variance v say as much as
n_eff = n m (1 - m) / v trials that are right or wrong: between n (all samples of a problem agree)
and n k (problems are equally hard). The interval is that of a binomial share of n_eff trials,
between Clopper and Pearson's and Jeffreys', with Student's t for the estimated variance.

Where few problems have what is rarer, right or wrong samples, v says little: of 30 problems with 1%
accuracy most draws have no right sample, or one. n_eff is then n. docs/evaluation.md has the
coverage, tools/benchmark_intervals.py makes its table.

scipy.special is imported within the functions: it takes half a second, and every controller
imports this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy

CONFIDENCE = 0.95
Array = Any
"""numpy's, float64"""
_FEW, _MANY = 8.0, 12.0
"""Problems that have what is rarer: up to _FEW the variance is not believed, from _MANY on it is"""
_MOST_TRIALS = 1e6
_LEAST = 1e-12
"""In place of 0, of which there is no Beta distribution; the bound is then 0 or 1 anyway"""


@dataclass(frozen=True)
class _Trials:
    """The binomial trials, right and wrong, that a set of problems amounts to."""

    right: Array
    wrong: Array
    shift: Array
    """From Jeffreys' bound (1/2) towards Clopper and Pearson's (1)"""
    tail: Array
    """Probability beyond a bound"""

    @property
    def below(self) -> tuple[Array, Array]:
        """a and b of the Beta distribution whose quantile is the lower bound."""
        return numpy.maximum(self.right + 1 - self.shift, _LEAST), self.wrong + self.shift

    @property
    def above(self) -> tuple[Array, Array]:
        """a and b of the Beta distribution whose quantile is the upper bound."""
        return self.right + self.shift, numpy.maximum(self.wrong + 1 - self.shift, _LEAST)


def share_interval(values: Array) -> tuple[float, float]:
    """Low and high of the mean of `values` [problems], each from 0 to 1; two at least."""
    low, high = share_intervals(numpy.asarray(values, dtype=float)[None])
    return float(low[0]), float(high[0])


def share_intervals(values: Array) -> tuple[Array, Array]:
    """`share_interval` of each row of `values` [repetitions, problems]."""
    from scipy.special import betaincinv

    trials = _trials(values)
    low = betaincinv(*trials.below, trials.tail)
    high = betaincinv(*trials.above, 1 - trials.tail)
    return numpy.where(trials.right > 0, low, 0.0), numpy.where(trials.wrong > 0, high, 1.0)


def covers(values: Array, truth: float) -> Array:
    """Return whether the interval of each row of `values` [repetitions, problems] holds `truth`."""
    from scipy.special import betainc

    trials = _trials(values)
    is_above_low = (trials.right == 0) | (betainc(*trials.below, truth) >= trials.tail)
    is_below_high = (trials.wrong == 0) | (betainc(*trials.above, truth) <= 1 - trials.tail)
    return is_above_low & is_below_high


def mean_margin(num_values: int, standard_error: float) -> float:
    """Half the width of Student's 95% interval of the mean of `num_values` numbers."""
    from scipy.special import stdtrit

    return float(stdtrit(num_values - 1, 0.5 + CONFIDENCE / 2)) * standard_error


def _trials(values: Array) -> _Trials:
    problems = values.shape[1]
    mean, variance = values.mean(1), values.var(1, ddof=1)
    rarer = numpy.where((mean <= 0.5)[:, None], values, 1 - values)
    squares = (rarer**2).sum(1)
    having = numpy.divide(rarer.sum(1) ** 2, squares, out=numpy.zeros_like(mean), where=squares > 0)
    doubt = numpy.clip((_MANY - having) / (_MANY - _FEW), 0, 1)
    largest = mean * (1 - mean)
    spread = numpy.divide(variance, largest, out=numpy.ones_like(mean), where=largest > 0)
    spread = numpy.minimum(spread, 1)
    spread = numpy.maximum(spread + (1 - spread) * doubt, problems / _MOST_TRIALS)
    count = problems / spread
    tail = (1 - CONFIDENCE) / 2
    students = 0.5 * math.erfc(mean_margin(problems, 1.0) / math.sqrt(2))
    return _Trials(
        mean * count,
        (1 - mean) * count,
        0.5 + 0.5 * doubt,
        tail * doubt + students * (1 - doubt),
    )

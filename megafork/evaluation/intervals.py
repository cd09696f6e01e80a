"""The 95% interval of a share: for the mean accuracy of new problems of the kind.

A problem's number lies between 0 and 1. n problems with mean m and variance v say as much as
n_eff = n m (1 - m) / v trials that are right or wrong: between n (all samples of a problem agree)
and n k (problems are equally hard). The interval is that of a binomial share of n_eff trials,
between Clopper and Pearson's and Jeffreys', with Student's t for the estimated variance.

Where few problems have what is rarer, right or wrong samples, v says little: of 30 problems with 1%
accuracy most draws have no right sample, or one. n_eff is then n. docs/evaluation.md has the
coverage, tools/benchmark_intervals.py makes its table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
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
_BISECTIONS = 50
_lgamma = numpy.vectorize(math.lgamma, otypes=[float])


@dataclass(frozen=True)
class _Trials:
    """What a set of problems says: `right` and `wrong` trials, the shift of a bound towards
    Clopper and Pearson's (1) from Jeffreys' (1/2), and the probability beyond a bound."""

    right: Array
    wrong: Array
    shift: Array
    tail: Array

    @property
    def below(self) -> tuple[Array, Array]:
        """a and b of the Beta distribution whose quantile is the lower bound."""
        return numpy.maximum(self.right + 1 - self.shift, _LEAST), self.wrong + self.shift

    @property
    def above(self) -> tuple[Array, Array]:
        """The same of the upper bound."""
        return self.right + self.shift, numpy.maximum(self.wrong + 1 - self.shift, _LEAST)


def share_interval(values: Array) -> tuple[float, float]:
    """Low and high of the mean of `values` [problems], each from 0 to 1; two at least."""
    low, high = share_intervals(numpy.asarray(values, dtype=float)[None])
    return float(low[0]), float(high[0])


def share_intervals(values: Array) -> tuple[Array, Array]:
    """`share_interval` of each row of `values` [repetitions, problems]."""
    trials = _trials(values)
    low = _quantile(*trials.below, trials.tail)
    high = _quantile(*trials.above, 1 - trials.tail)
    return numpy.where(trials.right > 0, low, 0.0), numpy.where(trials.wrong > 0, high, 1.0)


def covers(values: Array, truth: float) -> Array:
    """Of each row of `values` [repetitions, problems]: does its interval hold `truth`?"""
    trials = _trials(values)
    is_above_low = (trials.right == 0) | (beta_cdf(truth, *trials.below) >= trials.tail)
    is_below_high = (trials.wrong == 0) | (beta_cdf(truth, *trials.above) <= 1 - trials.tail)
    return is_above_low & is_below_high


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
    students = 0.5 * math.erfc(t_quantile(1 - tail, problems - 1) / math.sqrt(2))
    return _Trials(
        mean * count,
        (1 - mean) * count,
        0.5 + 0.5 * doubt,
        tail * doubt + students * (1 - doubt),
    )


def beta_cdf(x: Array, a: Array, b: Array) -> Array:
    """The regularised incomplete beta function, by Lentz's continued fraction; a, b > 0."""
    x, a, b = numpy.broadcast_arrays(*(numpy.asarray(each, dtype=float) for each in (x, a, b)))
    is_turned = x > (a + 1) / (a + b + 2)
    x = numpy.where(is_turned, 1 - x, x)
    a, b = numpy.where(is_turned, b, a), numpy.where(is_turned, a, b)
    tiny = 1e-300
    front = _lgamma(a + b) - _lgamma(a) - _lgamma(b)
    front = front + a * numpy.log(numpy.maximum(x, tiny)) + b * numpy.log1p(-x)

    def nonzero(value: Array) -> Array:
        return numpy.where(numpy.abs(value) < tiny, tiny, value)

    above, below = numpy.ones_like(x), 1 / nonzero(1 - (a + b) * x / (a + 1))
    fraction = below
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            below, above = 1 / nonzero(1 + term * below), nonzero(1 + term / above)
            fraction = fraction * below * above
        if numpy.all(numpy.abs(below * above - 1) < 1e-12):
            break
    found = numpy.exp(front) * fraction / a
    return numpy.where(is_turned, 1 - found, found)


def _quantile(a: Array, b: Array, probability: Array) -> Array:
    low, high = numpy.zeros_like(a), numpy.ones_like(a)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_below = beta_cdf(middle, a, b) < probability
        low, high = numpy.where(is_below, middle, low), numpy.where(is_below, high, middle)
    return (low + high) / 2


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Of Student's t, by bisection; `probability` above 0.5. Normal beyond 10,000 degrees."""
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """For t >= 0. Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums."""
    if degrees > 10_000:
        return 0.5 + 0.5 * math.erf(t / math.sqrt(2))
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    is_odd = degrees % 2
    term = math.cos(angle) if is_odd else 1.0
    total = 0.0 if degrees == 1 else term
    for i in range(3 if is_odd else 2, degrees - 1, 2):
        term *= square * (i - 1) / i
        total += term
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return 0.5 + inside / 2

"""avg@k, pass@k, maj@k and their intervals: pure functions of what the samples said and scored.

For problem p, n samples with accuracies a_1..a_n (1.0: right) and extracted answers. Every estimate
is a mean over problems of a number for each problem, and problems are the units of its interval:
docs/evaluation.md, with the intervals' coverage, whose table tools/benchmark_intervals.py makes.

scipy.special is imported within the functions: it takes half a second, and every controller
imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy

from megafork.answers.comparison import canonical_answer
from megafork.answers.places import BOXED, find_answer
from megafork.config import RewardConfig

CONFIDENCE = 0.95
EXACT_SAMPLES = 128
"""Up to as many samples of a problem maj@k is computed exactly."""
_DRAWS = 4096
_FEW, _MANY = 8.0, 12.0
"""Problems that have what is rarer: up to _FEW the variance is not believed, from _MANY on it is"""
_MOST_TRIALS = 1e6
_LEAST = 1e-12
"""In place of 0, of which there is no Beta distribution; the bound is then 0 or 1 anyway"""
Array = Any
"""numpy's, float64"""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval for new problems of the kind."""

    value: float
    low: float | None
    high: float | None
    """None: one problem has no interval"""
    standard_error: float | None
    """For new problems with new samples: both components"""


def estimate(values: Sequence[float] | Array, *, is_share: bool = True) -> Estimate:
    """Mean of one number for each problem.

    is_share: the numbers lie between 0 and 1, and the interval is `share_intervals`'; else it is
    Student's t.
    """
    count = len(values)
    if count == 0:
        raise ValueError("an estimate needs one problem at least")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    if is_share:
        low, high = (float(end[0]) for end in share_intervals(numpy.array([values])))
        return Estimate(mean, min(low, mean), max(high, mean), error)
    margin = mean_margin(count, error)
    return Estimate(mean, mean - margin, mean + margin, error)


def share_intervals(values: Array) -> tuple[Array, Array]:
    """Return low and high of the mean share of each row of `values` [repetitions, problems].

    P problems (two at least) with numbers between 0 and 1, mean m and variance v say as much as
    n_eff = P m (1 - m) / v trials that are right or wrong: between P (all samples of a problem
    agree) and P k (problems are equally hard). The interval is that of a binomial share of n_eff
    trials, between Clopper and Pearson's and Jeffreys', with Student's t for the estimated
    variance. Where few problems have what is rarer, right or wrong samples, v says little: of 30
    problems with 1% accuracy most draws have no right sample, or one. n_eff is then P.
    """
    from scipy.special import betaincinv

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
    trials = problems / spread
    right, wrong = mean * trials, (1 - mean) * trials

    students = 0.5 * math.erfc(mean_margin(problems, 1.0) / math.sqrt(2))
    tail = (1 - CONFIDENCE) / 2 * doubt + students * (1 - doubt)
    shift = 0.5 + 0.5 * doubt  # from Jeffreys' bound (1/2) towards Clopper and Pearson's (1)
    low = betaincinv(numpy.maximum(right + 1 - shift, _LEAST), wrong + shift, tail)
    high = betaincinv(right + shift, numpy.maximum(wrong + 1 - shift, _LEAST), 1 - tail)
    return numpy.where(right > 0, low, 0.0), numpy.where(wrong > 0, high, 1.0)


def mean_margin(num_values: int, standard_error: float) -> float:
    """Half the width of Student's 95% interval of the mean of `num_values` numbers."""
    from scipy.special import stdtrit

    return float(stdtrit(num_values - 1, 0.5 + CONFIDENCE / 2)) * standard_error


@dataclass(frozen=True)
class Judged:
    """The judged samples of P problems, n of each: columns [P, n]."""

    accuracy: Array
    """float64, 1.0: right"""
    extracted: Array
    """The answers that vote, str, or None"""
    length: Array
    """int64, tokens"""
    truncated: Array
    """bool: it did not end by itself"""

    @classmethod
    def of(cls, samples: Iterable[tuple[float, str | None, int, bool]], num_samples: int) -> Self:
        """Make the columns of (accuracy, extracted, length, truncated), problem after problem."""
        dtypes = (numpy.float64, object, numpy.int64, numpy.bool_)
        columns = zip(zip(*samples, strict=True), dtypes, strict=True)
        return cls(*(numpy.array(c, dtype).reshape(-1, num_samples) for c, dtype in columns))


def avg_at_k(judged: Judged) -> Estimate:
    return estimate(judged.accuracy.mean(1))


def sampling_error(accuracy: Array) -> float | None:
    """Standard error of avg@k if the problems stay and only the samples [P, n] are drawn anew.

    None where a problem has a single sample.
    """
    problems, samples = accuracy.shape
    if samples < 2:
        return None
    return math.sqrt(math.fsum(accuracy.var(1, ddof=1) / samples)) / problems


def mean_length(judged: Judged) -> Estimate:
    """Tokens of a response."""
    found = estimate(judged.length.mean(1), is_share=False)
    return found if found.low is None else replace(found, low=max(0.0, found.low))


def truncated_fraction(judged: Judged) -> Estimate:
    """Responses that did not end by themselves."""
    return estimate(judged.truncated.mean(1))


def passes(judged: Judged, k: int) -> Estimate:
    """pass@k; a sample counts as right when its accuracy is 1."""
    num_right = (judged.accuracy >= 1.0).sum(1).tolist()
    return estimate([pass_at_k(judged.accuracy.shape[1], right, k) for right in num_right])


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one.

    1 - C(n-c, k) / C(n, k), the unbiased estimate of Chen et al. (2021), as a product that neither
    overflows nor cancels for thousands of samples.
    """
    n, c = num_samples, num_right
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= right={c} <= n={n} and 1 <= k={k} <= n")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))


@dataclass(frozen=True)
class Majority:
    value: float
    error: float
    """Standard error of the Monte Carlo; 0: exact"""


def majority_at_k(
    answers: Sequence[str | None], accuracies: Sequence[float], k: int, *, seed: int = 0
) -> Majority:
    """Expected accuracy of the answer that most of k samples gave, of n without replacement.

    A None does not vote. Of tied answers each is equally likely to win; no vote at all scores 0.
    An answer's accuracy is the mean of those that gave it. Exact by generating functions up to
    EXACT_SAMPLES samples; beyond, the mean of 4096 draws with their standard error.
    """
    n = len(answers)
    if len(accuracies) != n or not 1 <= k <= n:
        raise ValueError(f"maj@k needs an accuracy for each answer and 1 <= k={k} <= n={n}")
    votes: dict[str, list[float]] = {}
    for answer, accuracy in zip(answers, accuracies, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(accuracy)
    sizes = [len(scores) for scores in votes.values()]
    means = [math.fsum(scores) / len(scores) for scores in votes.values()]
    if not sizes:
        return Majority(0.0, 0.0)
    if k == n:  # one subset
        tied = [mean for size, mean in zip(sizes, means, strict=True) if size == max(sizes)]
        return Majority(math.fsum(tied) / len(tied), 0.0)
    if n <= EXACT_SAMPLES:
        return Majority(_expected_majority(sizes, means, n, k), 0.0)
    return _drawn_majority(sizes, means, n, k, seed)


def majorities(judged: Judged, k: int) -> tuple[Estimate, float]:
    """maj@k, and the Monte Carlo error of its value (0: exact)."""
    pairs = zip(judged.extracted.tolist(), judged.accuracy.tolist(), strict=True)
    found = [majority_at_k(answers, accuracies, k) for answers, accuracies in pairs]
    error = math.sqrt(math.fsum(each.error**2 for each in found)) / len(found)
    return estimate([each.value for each in found]), error


def _expected_majority(sizes: list[int], means: list[float], n: int, k: int) -> float:
    """Expected accuracy over all subsets of k samples.

    For each winning number of votes v there are polynomials in the votes that are spent, one for
    each number of answers tied at v: they count subsets, plainly and weighted by the tied answers'
    accuracies.
    """
    silent = [math.comb(n - sum(sizes), i) for i in range(k + 1)]
    total = 0.0
    for v in range(1, min(k, max(sizes)) + 1):
        most_tied = k // v
        ways = numpy.zeros((most_tied + 1, k + 1))
        ways[0] = silent
        weighted = numpy.zeros_like(ways)
        for size, mean in zip(sizes, means, strict=True):
            ways_next, weighted_next = ways.copy(), weighted.copy()  # no vote of this answer
            for u in range(1, min(size, v - 1) + 1):
                count = float(math.comb(size, u))
                ways_next[:, u:] += count * ways[:, :-u]
                weighted_next[:, u:] += count * weighted[:, :-u]
            if size >= v:
                count = float(math.comb(size, v))
                ways_next[1:, v:] += count * ways[:-1, :-v]
                weighted_next[1:, v:] += count * (weighted[:-1, :-v] + mean * ways[:-1, :-v])
            ways, weighted = ways_next, weighted_next
        total += sum(weighted[tied, k] / tied for tied in range(1, most_tied + 1))
    return float(total / math.comb(n, k))


def _drawn_majority(sizes: list[int], means: list[float], n: int, k: int, seed: int) -> Majority:
    generator = numpy.random.default_rng([seed, n, k])
    counts = generator.multivariate_hypergeometric(
        [*sizes, n - sum(sizes)], k, size=_DRAWS, method="marginals"
    )[:, :-1]
    most = counts.max(axis=1, keepdims=True)
    tied = (counts == most) & (most > 0)
    scores = (tied * numpy.asarray(means)).sum(axis=1) / numpy.maximum(tied.sum(axis=1), 1)
    return Majority(float(scores.mean()), float(scores.std(ddof=1) / math.sqrt(_DRAWS)))


def vote(
    response: str,
    how: Literal["auto", "boxed", "text"],
    reward: RewardConfig,
    *,
    truncated: bool,
) -> str | None:
    """The text by which maj@k counts this response; None: no vote.

    boxed: the answer where the verifier looks for it, a box unless reward.answer_from is set; for
    maths in its canonical form, so that 1/2 and 0.5 are one. text: the whole response, stripped.
    auto: the answer; where there is none, the text of a response that ended.
    """
    if how == "text":
        return response.strip() or None
    answer = find_answer(response, reward.places or BOXED)
    if answer is not None:
        is_maths = reward.verifiers[0] == "maths"
        return canonical_answer(answer) if is_maths else "".join(answer.split())
    if how == "boxed" or truncated:
        return None
    return response.strip() or None


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})

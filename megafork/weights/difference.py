"""Statistics of two engines' log-probability differences, with errors clustered by response.

Tokens of a response share its text, so their differences are not independent: a standard error is
that of sums over whole responses. With few responses it is by chance too small now and then, so it
is never taken below the one of independent tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megafork.algorithms.surrogates import k3_divergence

MARGIN = 6.0
"""Standard errors by which an estimate has to pass its bound"""


@dataclass(frozen=True)
class Estimate:
    value: float
    error: float
    """its standard error; infinite where one response is all there is"""

    @property
    def size(self) -> Estimate:
        return Estimate(abs(self.value), self.error)

    def is_above(self, bound: float) -> bool:
        """Return whether the value passes the bound by more than chance explains (MARGIN)."""
        return self.value - MARGIN * self.error > bound


@dataclass(frozen=True)
class Difference:
    """The differences of trainer less engine, in nats, over all tokens of a probe."""

    num_tokens: int
    absolute: float
    """mean |difference|"""
    k3: float
    squared: float
    """mean square"""
    mean: Estimate
    slope: Estimate
    """Slope of the difference over the mean of the two log-probabilities. Over the trainer's alone
    the sampling makes a slope: a token that the engine thinks too likely is sampled too often."""
    noise: Estimate | None
    """Logarithm of the engine's mean square error over that of the trainer's own rounding, both
    against float32 on the same tokens; None where nothing is rounded"""


_COLUMNS = 13


def sums_by_response(
    ours_T: Tensor,
    theirs_T: Tensor,
    response_T: Tensor,
    num_responses: int,
    rounding: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return float64 [responses, _COLUMNS]; those of several ranks may be added.

    ours_T, theirs_T: log-probabilities of trainer and engine. rounding: the trainer's own, once
    rounded as the engine rounds and once in float32.
    """
    ours, theirs = ours_T.double(), theirs_T.double()
    d, a = ours - theirs, (ours + theirs) / 2
    engine2 = trainer2 = torch.zeros_like(d)
    if rounding is not None:
        rounded, exact = (part.double() for part in rounding)
        engine2, trainer2 = (theirs - exact).square(), (rounded - exact).square()
    terms = (
        torch.ones_like(d),
        d,
        d.abs(),
        k3_divergence(ours_T, theirs_T).double(),
        d.square(),
        a,
        a.square(),
        a * d,
        engine2,
        trainer2,
        engine2.square(),
        trainer2.square(),
        engine2 * trainer2,
    )
    sums = torch.zeros(num_responses, _COLUMNS, dtype=torch.float64, device=ours.device)
    return sums.index_add_(0, response_T.to(ours.device), torch.stack(terms, 1))


def describe(sums_RC: Tensor, *, rounded: bool) -> Difference:
    """Describe the difference. sums_RC: `sums_by_response` over all ranks, on the CPU."""
    tokens_R, d_R, _, _, _, a_R, a2_R, ad_R, engine2_R, trainer2_R, *_ = sums_RC.T
    count, d, absolute, k3, d2, a, _, _, engine2, trainer2, engine4, trainer4, both = sums_RC.sum(0)
    mean_d, mean_a = d / count, a / count

    variance = d2 / count - mean_d**2
    mean = _estimate(mean_d, d_R - mean_d * tokens_R, count, variance * count)

    spread_R = a2_R - 2 * mean_a * a_R + mean_a**2 * tokens_R
    together_R = ad_R - mean_a * d_R - mean_d * a_R + mean_a * mean_d * tokens_R
    spread = spread_R.sum()
    value = together_R.sum() / spread
    left = variance - value**2 * spread / count
    slope = _estimate(value, together_R - value * spread_R, spread, left * spread)

    noise = None
    if rounded:
        residuals_R = engine2_R / engine2 - trainer2_R / trainer2
        of_tokens = engine4 / engine2**2 - 2 * both / (engine2 * trainer2) + trainer4 / trainer2**2
        one = torch.ones((), dtype=torch.float64)
        noise = _estimate((engine2 / trainer2).log(), residuals_R, one, of_tokens)
    return Difference(
        num_tokens=int(count),
        absolute=float(absolute / count),
        k3=float(k3 / count),
        squared=float(d2 / count),
        mean=mean,
        slope=slope,
        noise=noise,
    )


def _estimate(value: Tensor, residuals_R: Tensor, weight: Tensor, of_tokens: Tensor) -> Estimate:
    """Return a value that is a sum over `weight`, with its standard error.

    residuals_R: the responses' parts of the sum, less what was expected. of_tokens: the sum of the
    squares of the tokens' parts. Without variation nothing can be told: the error is infinite.
    """
    if not value.isfinite():
        return Estimate(0.0, math.inf)
    number = len(residuals_R)
    if number < 2:
        return Estimate(float(value), math.inf)
    of_responses = number / (number - 1) * residuals_R.square().sum()
    return Estimate(float(value), float(torch.maximum(of_responses, of_tokens).sqrt() / weight))

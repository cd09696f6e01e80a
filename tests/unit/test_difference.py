"""The comparison of trainer and engine: what it finds, and how rarely it finds what is not there.

Each check is simulated from logits: of the trainer, of the engine, and without any rounding; the
tokens are drawn from the engine's distribution, as in a run.
"""

from __future__ import annotations

import math

import pytest
import torch

from megafork.config import SyncConfig
from megafork.errors import UserError
from megafork.weights.difference import MARGIN, Difference, describe, sums_by_response
from megafork.weights.mismatch_check import BOUNDS, Agreement, require

VOCAB = 64
LIMITS = BOUNDS["bfloat16"]


def simulated(
    generator: torch.Generator,
    *,
    responses: int = 8,
    tokens: int = 256,
    scale: float = 4.0,
    rounding: float = 0.02,
    engine_rounding: float | None = None,
    extra_noise: float = 0.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    shift: float = 0.0,
) -> Difference:
    """rounding: the standard deviation of the errors of logits in nats; half of their variance is
    the same for all tokens of a response."""
    rows = responses * tokens

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, VOCAB, generator=generator)

    def errors(size: float) -> torch.Tensor:
        of_response = normal(responses).repeat_interleave(tokens, 0)
        return size * math.sqrt(0.5) * (of_response + normal(rows))

    exact = normal(rows) * scale
    trainer = exact + errors(rounding)
    engine = exact + errors(engine_rounding or rounding) + extra_noise * normal(rows) + shift
    engine = (engine / temperature).log_softmax(1)
    if top_p < 1:
        ordered, order = engine.exp().sort(1, descending=True)
        kept = torch.zeros(rows, VOCAB, dtype=torch.bool)
        kept.scatter_(1, order, ordered.cumsum(1) - ordered < top_p)
        engine = engine.masked_fill(~kept, -torch.inf).log_softmax(1)
    drawn = torch.multinomial(engine.exp(), 1, generator=generator)
    ours, theirs, known = (
        logits.log_softmax(1).gather(1, drawn)[:, 0] for logits in (trainer, engine, exact)
    )
    response = torch.arange(responses).repeat_interleave(tokens)
    sums = sums_by_response(ours, theirs, response, responses, (ours, known))
    return describe(sums, rounded=True)


FAULTS = {
    "top_p of 0.95": ({"top_p": 0.95}, "sync.max_bias"),
    "temperature of 0.95": ({"temperature": 0.95}, "sync.max_slope"),
    "noise of 0.08 on the logits": ({"extra_noise": 0.08, "rounding": 0.03}, "max_noise_ratio"),
}


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["unsure", "sure"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_every_time(fault, scale):
    settings, complaint = FAULTS[fault]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        found = simulated(generator, scale=scale, **settings)
        with pytest.raises(UserError, match=complaint):
            require(Agreement(found, max_difference=1.0), SyncConfig(), "bfloat16")


def test_a_constant_on_all_logits_and_a_better_engine_are_no_fault():
    generator = torch.Generator().manual_seed(0)
    for settings in ({"shift": 0.5}, {"engine_rounding": 0.001}, {"engine_rounding": 0.03}):
        found = simulated(generator, **settings)
        require(Agreement(found, max_difference=1.0), SyncConfig(), "bfloat16")


@pytest.mark.parametrize("tokens", [40, 80])
@pytest.mark.parametrize("rounding", [0.01, 0.06])
def test_false_alarms_are_rarer_than_one_in_a_million(rounding, tokens):
    """Standard errors by which healthy estimates pass their bounds, and their tail to MARGIN."""
    generator = torch.Generator().manual_seed(0)
    beyond = []
    for _ in range(300):
        scale = 1.0 + 3.0 * torch.rand((), generator=generator).item()
        found = simulated(
            generator,
            tokens=tokens,
            scale=scale,
            rounding=rounding,
            engine_rounding=1.5 * rounding,
        )
        of_each = (
            (abs(found.mean.value) - LIMITS.mean - found.squared) / found.mean.error,
            (abs(found.slope.value) - LIMITS.slope) / found.slope.error,
            (found.noise.value - math.log(LIMITS.noise)) / found.noise.error,
        )
        beyond.append(max(of_each))
    ordered = torch.tensor(beyond).sort(descending=True).values
    rates = [tail(ordered, share) for share in (0.2, 0.1, 0.05)]
    assert max(rates) < 1e-6


def tail(ordered: torch.Tensor, share: float) -> float:
    """The probability of MARGIN, by an exponential fitted to the largest `share` of the values.

    A normal tail falls faster than that.
    """
    count = int(share * len(ordered))
    start = ordered[count]
    excess = (ordered[:count] - start).mean()
    return share * math.exp(-max(0.0, float((MARGIN - start) / excess)))


def test_estimates_are_those_of_least_squares_and_of_ratios():
    generator = torch.Generator().manual_seed(1)
    ours, noise = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    theirs = 1.1 * ours + 0.3 + 0.1 * noise
    rounded, exact = ours + 0.2, ours
    response = torch.arange(60) % 7
    found = describe(
        sums_by_response(ours, theirs, response, 8, (rounded, exact)), rounded=True
    )  # one response has no tokens
    d, a = ours - theirs, (ours + theirs) / 2
    slope = torch.linalg.lstsq(torch.stack([torch.ones(60), a], 1).double(), d).solution[1]
    assert found.num_tokens == 60
    assert found.mean.value == pytest.approx(float(d.mean()), rel=1e-9)
    assert found.absolute == pytest.approx(float(d.abs().mean()), rel=1e-9)
    assert found.slope.value == pytest.approx(float(slope), rel=1e-9)
    expected = ((theirs - exact) ** 2).mean() / 0.04
    assert math.exp(found.noise.value) == pytest.approx(float(expected), rel=1e-9)


def test_sums_of_ranks_add_up():
    generator = torch.Generator().manual_seed(2)
    ours, theirs = torch.randn(2, 40, generator=generator)
    response = torch.arange(40) // 10
    whole = sums_by_response(ours, theirs, response, 4)
    halves = [
        sums_by_response(ours[part], theirs[part], response[part], 4)
        for part in (slice(0, 17), slice(17, 40))
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("responses", [1, 2])
def test_too_little_to_tell_is_no_alarm(responses):
    """Equal values have no spread to have a slope over; one response has no error."""
    values = torch.full((3 * responses,), -1.0)
    index = torch.arange(responses).repeat_interleave(3)
    sums = sums_by_response(values, values, index, responses, (values, values))
    require(Agreement(describe(sums, rounded=True), 0.0), SyncConfig(), "bfloat16")

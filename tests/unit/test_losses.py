"""The objectives' surrogates, ratios, counts and mismatch weights against values worked out by
hand. tests/test_objectives.py has whole optimizer steps."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, getcontext

import pytest
import torch

from megafork.algorithms import losses
from megafork.algorithms.losses import policy_loss
from megafork.algorithms.mismatch import importance_weights
from megafork.algorithms.objectives import load_objective
from megafork.algorithms.regularizers import kl_estimate
from megafork.algorithms.surrogates import k3_divergence
from megafork.config import AlgorithmConfig, MismatchConfig
from tests.helpers.loss_rows import rows_of

PPO = AlgorithmConfig()


CLIPPED = [f"ratio/clip_{bound}_fraction" for bound in ("low", "high", "dual")]


def loss_of(logprobs, rows, algorithm, **counts):
    objective, _ = load_objective(algorithm.objective)
    return policy_loss(logprobs, rows, algorithm, objective, **counts)


def loss_and_gradient(ratio, rows, algorithm, denominator=10):
    """Of log-probabilities whose ratio to rows.old_logprobs_N is `ratio`."""
    logprobs = (rows.old_logprobs_N + torch.tensor(ratio).log()).requires_grad_()
    found = loss_of(logprobs, rows, algorithm, denominator=denominator, num_sequences=2)
    found.loss.backward()
    return found.loss.item(), logprobs.grad.tolist(), found


def clip_counts(found):
    return [found.metrics[name].item() for name in CLIPPED]


def close(values):
    return pytest.approx(values, abs=1e-6)


RATIO, ADVANTAGE = [1.1, 1.5, 0.5, 0.5, 3.0], [1.0, 2.0, -1.0, 1.0, 9.0]
SELECTED = [True, True, True, True, False]


def test_ppo_by_hand():
    """Five tokens: inside the range, clipped above, clipped below, not clipped (the minimum takes
    the worse side), not selected; 10 tokens in the denominator."""
    rows = rows_of(ADVANTAGE, SELECTED)
    loss, gradient, found = loss_and_gradient(RATIO, rows, PPO)
    # 1.1 * 1 + 1.28 * 2 + 0.8 * -1 + 0.5 * 1 = 3.36
    assert loss == close(-0.336)
    # -A r / 10 where the unclipped side is the minimum, else 0
    assert gradient == close([-0.11, 0.0, 0.0, -0.05, 0.0])
    assert clip_counts(found) == [1, 1, 0]


def test_dual_clip_by_hand():
    """A negative advantage at ratio 5: bounded by 3; a positive one is not touched."""
    config = AlgorithmConfig(clip_dual=3.0)
    rows = rows_of([-2.0, -2.0, 1.0], [True, True, True])
    loss, gradient, found = loss_and_gradient([5.0, 2.0, 0.5], rows, config)
    # max(-10, -6) = -6; max(-4, -6) = -4; 0.5
    assert loss == close(-(-6 - 4 + 0.5) / 10)
    assert gradient == close([0.0, 0.4, -0.05])
    assert clip_counts(found) == [0, 0, 1]


def test_cispo_by_hand():
    """Clipped tokens keep their gradient: the clipped ratio times A, whatever the sign of A."""
    config = AlgorithmConfig(objective="cispo", clip_low=1.0, clip_high=0.28)
    rows = rows_of(ADVANTAGE, SELECTED, old=torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]))
    loss, gradient, found = loss_and_gradient(RATIO, rows, config)
    factors = [1.1 * 1, 1.28 * 2, 0.5 * -1, 0.5 * 1]
    logprobs = [math.log(r) - old for r, old in zip(RATIO, (1, 2, 3, 4), strict=False)]
    assert loss == close(-sum(f * x for f, x in zip(factors, logprobs, strict=True)) / 10)
    assert gradient == close([-f / 10 for f in factors] + [0.0])
    assert clip_counts(found) == [0, 1, 0]


def test_gspo_by_hand():
    """Two sequences: ratios 2 and 1/2 and 1.1 and 1.1, of which the second token is unselected but
    enters the ratio: (1.21)^(1/3) with a third token that does not move."""
    config = AlgorithmConfig(objective="gspo", clip_low=0.2, clip_high=0.28)
    rows = rows_of(
        [1.0, 1.0, -1.0, -1.0, -1.0], [True, True, True, False, True], sequence=[0, 0, 1, 1, 1]
    )
    loss, gradient, found = loss_and_gradient([2.0, 0.5, 1.1, 1.1, 1.0], rows, config)
    s = 1.21 ** (1 / 3)
    assert found.ratio_N.tolist() == close([1.0, 1.0, s, s, s])
    assert loss == close(-(2 * 1.0 - 2 * s) / 10)
    assert gradient == close([-0.1, -0.1, s / 10, 0.0, s / 10])


def test_gspo_clips_whole_sequences():
    config = AlgorithmConfig(objective="gspo", clip_low=3e-4, clip_high=4e-4)
    rows = rows_of([1.0, 1.0, 1.0], [True, True, True], sequence=[0, 0, 1])
    loss, gradient, found = loss_and_gradient([1.002, 1.0, 1.0002], rows, config)
    assert gradient == close([0.0, 0.0, -0.10002])
    assert loss == close(-(2 * 1.0004 + 1.0002) / 10)
    assert clip_counts(found) == [0, 2, 0]


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
def test_losses_of_micro_batches_add_up(objective):
    torch.manual_seed(0)
    config = AlgorithmConfig(objective=objective)
    logprobs, old, advantages = torch.randn(3, 40)
    rows = rows_of(advantages, torch.rand(40) < 0.3, old=old, sequence=[0] * 13 + [1] * 27)
    groups = {"denominator": 40, "num_sequences": 2}
    whole = loss_of(logprobs, rows, config, **groups).loss
    parts = [
        loss_of(part, some, config, **groups).loss
        for part, some in zip(logprobs.split([13, 0, 27]), rows.split([13, 0, 27]), strict=True)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
def test_without_a_selected_token_the_loss_is_a_connected_zero(objective):
    rows = rows_of([1.0] * 4, [False] * 4)
    loss, gradient, _ = loss_and_gradient([2.0] * 4, rows, AlgorithmConfig(objective=objective))
    assert (loss, gradient) == (0.0, [0.0] * 4)


def test_an_unselected_token_cannot_spoil_the_gradient():
    logprobs = torch.tensor([0.0, 200.0, -torch.inf], requires_grad=True)
    rows = rows_of([1.0] * 3, [True, False, False], old=torch.tensor([0.0, 0.0, -torch.inf]))
    loss = loss_of(logprobs, rows, PPO, denominator=2, num_sequences=1).loss
    loss.backward()
    assert logprobs.grad.tolist() == [-0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("algorithm", "advantage", "value"),
    [
        ({}, 2.0, -2.0 * 1.28),
        ({"clip_dual": 3.0}, 2.0, -2.0 * 1.28),
        ({"clip_dual": 3.0}, -2.0, 2.0 * 3.0),
        ({"objective": "gspo"}, 2.0, -2.0 * 1.0004),
        ({"objective": "gspo", "clip_dual": 3.0}, -2.0, 2.0 * 3.0),
        ({"clip_dual": 3.0}, 0.0, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("log_ratio", [80.0, 89.0, 200.0, 3e38, math.inf])
def test_a_ratio_that_overflows_is_clipped_like_any_other(algorithm, advantage, value, log_ratio):
    """e^89 is no float32. The clip decides, so the token has a constant and no gradient; a
    neighbour keeps its own."""
    rows = rows_of([advantage, 1.0], [True, True], sequence=[0, 1])
    logprobs = torch.tensor([log_ratio, 0.0], requires_grad=True)
    found = loss_of(logprobs, rows, AlgorithmConfig(**algorithm), denominator=1, num_sequences=2)
    found.loss.backward()
    assert found.loss.item() == close(value - 1.0)
    assert logprobs.grad.tolist() == [0.0, -1.0]
    assert found.ratio_N[0] == torch.tensor(log_ratio, dtype=torch.float64).exp().float()


@pytest.mark.parametrize("objective", ["ppo", "gspo"])
def test_an_overflow_that_no_clip_bounds_is_no_number(objective):
    """At a negative advantage the minimum takes the ratio itself: the guard has to see it."""
    rows = rows_of([-1.0], [True])
    logprobs = torch.tensor([200.0], requires_grad=True)
    config = AlgorithmConfig(objective=objective)
    loss = loss_of(logprobs, rows, config, denominator=1, num_sequences=1).loss
    loss.backward()
    assert loss.item() == math.inf
    assert not logprobs.grad.isfinite().any()


def test_cispos_weight_is_bounded_where_the_ratio_overflows():
    config = AlgorithmConfig(objective="cispo")
    for advantage in (2.0, -2.0):
        loss, gradient, _ = loss_and_gradient_at(torch.tensor([200.0]), [advantage], config)
        assert gradient == close([-advantage * 5.0])
        assert loss == pytest.approx(-advantage * 5.0 * 200.0)


def loss_and_gradient_at(logprobs, advantages, config):
    logprobs = logprobs.clone().requires_grad_()
    rows = rows_of(advantages, [True] * len(advantages))
    found = loss_of(logprobs, rows, config, denominator=1, num_sequences=1)
    found.loss.backward()
    return found.loss.item(), logprobs.grad.tolist(), found


def test_a_weight_multiplies_the_surrogate():
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.0])
    rows = replace(rows_of(ADVANTAGE, SELECTED), weight_N=weight)
    loss, gradient, _ = loss_and_gradient(RATIO, rows, PPO)
    assert loss == close(-(0.5 * 1.1 + 1.28 * 2 + 2 * -0.8 + 0.25 * 0.5) / 10)
    assert gradient == close([-0.055, 0.0, 0.0, -0.0125, 0.0])


def test_rows_that_an_objective_needs():
    """Sequence 0 has a token with a gradient, 1 has none; a row of 0 is outside the loss."""
    gradient = torch.tensor([False, True, False, False, False])
    in_loss = torch.tensor([True, True, False, True, True])
    sequence = torch.tensor([0, 0, 0, 1, 1])

    def needed(objective):
        needs = load_objective(objective)[1]
        return losses.needed_rows(gradient, in_loss, sequence, needs, 2).tolist()

    assert needed("ppo") == needed("cispo") == gradient.tolist()
    assert needed("gspo") == [True, True, False, False, False]


def test_k3_by_hand():
    ours, theirs = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    # r = e^-1: r - 1 - log r = e^-1 - 1 + 1
    assert k3_divergence(ours, theirs).tolist() == pytest.approx([0.0, math.exp(-1)], abs=1e-6)


@pytest.mark.parametrize("size", [10.0**-k for k in range(0, 19, 2)] + [1e-5, 9.9e-5, 1.1e-4])
@pytest.mark.parametrize("sign", [1, -1])
def test_k3_and_its_slope_are_right_to_the_last_digits_at_any_size(size, sign):
    """x^2/2 of an x of 1e-7 is less than the rounding of expm1(x) - x in float32."""
    getcontext().prec = 80
    ours = torch.tensor([sign * size], requires_grad=True)
    value = k3_divergence(ours, torch.zeros(1))
    value.sum().backward()
    x = Decimal(ours.item())
    assert value.item() == pytest.approx(float(x.exp() - 1 - x), rel=3e-7, abs=0)
    assert ours.grad.item() == pytest.approx(float(x.exp() - 1), rel=3e-7, abs=0)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("x", [1e-12, 1e-7, 1e-5, 1e-3, 1.0, -40.0, 60.0, 3000.0])
def test_kl_estimates_and_their_slopes(estimator, x):
    log_ratio = torch.tensor([x], requires_grad=True)
    value = kl_estimate(log_ratio, estimator)
    value.sum().backward()
    exact = Decimal(log_ratio.item())
    wanted, slope = {
        "k1": (exact, exact),
        "k2": (exact * exact / 2, exact),
        "k3": ((-exact).exp() - 1 + exact, 1 - (-exact).exp()),
    }[estimator]
    assert value.item() == pytest.approx(float(wanted), rel=3e-7, abs=0)
    assert log_ratio.grad.item() == pytest.approx(float(slope), rel=3e-7, abs=0)


# pi_old / pi_engine of five tokens; the last is outside the loss mask.
MISMATCH_RATIO = [1.0, 2.5, 0.25, 0.625, 8.0]


def weights(**config):
    old = torch.tensor(MISMATCH_RATIO).log() - 1.0
    in_loss = torch.tensor([True, True, True, True, False])
    sequence = torch.tensor([0, 0, 1, 1, 0])
    config = MismatchConfig(**config)
    return importance_weights(
        old, torch.full((5,), -1.0), in_loss, sequence, config, num_sequences=2
    )


@pytest.mark.parametrize(
    ("config", "expected", "truncated", "masked"),
    [
        ({"correction": "none"}, [1.0] * 4, [0, 0, 0, 0], [0, 0, 0, 0]),
        ({"correction": "truncate"}, [1.0, 2.0, 0.25, 0.625], [0, 1, 0, 0], [0, 0, 0, 0]),
        ({"correction": "mask"}, [1.0, 0.0, 0.0, 0.625], [0, 0, 0, 0], [0, 1, 1, 0]),
        (
            {"correction": "mask", "max_weight": 3.0, "min_weight": 0.7},
            [1.0, 2.5, 0.0, 0.0],
            [0, 0, 0, 0],
            [0, 0, 1, 1],
        ),
        # The products are 2.5 and 0.15625.
        (
            {"correction": "truncate", "level": "sequence"},
            [2.0, 2.0, 0.15625, 0.15625],
            [1, 1, 0, 0],
            [0, 0, 0, 0],
        ),
        (
            {"correction": "mask", "level": "sequence", "max_weight": 4.0},
            [2.5, 2.5, 0.0, 0.0],
            [0, 0, 0, 0],
            [0, 0, 1, 1],
        ),
    ],
    ids=str,
)
def test_importance_weights_by_hand(config, expected, truncated, masked):
    found = weights(**config)
    assert found.weight_T[:4].tolist() == close(expected)
    assert found.truncated_T[:4].tolist() == [bool(x) for x in truncated]
    assert found.masked_T[:4].tolist() == [bool(x) for x in masked]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_equal_policies_have_weights_of_exactly_one(correction, level):
    logprobs = -5 * torch.rand(30)
    config = MismatchConfig(correction=correction, level=level, max_weight=1.0)
    found = importance_weights(
        logprobs, logprobs, torch.ones(30).bool(), torch.arange(30) % 4, config, num_sequences=4
    )
    assert torch.equal(found.weight_T, torch.ones(30))
    assert not found.truncated_T.any()
    assert not found.masked_T.any()


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_a_hopeless_token_does_no_harm(correction):
    """The engine gave e^-200 to what the trainer is sure of, and the other way round."""
    found = importance_weights(
        torch.tensor([0.0, -200.0]),
        torch.tensor([-200.0, 0.0]),
        torch.ones(2).bool(),
        torch.zeros(2, dtype=torch.int64),
        MismatchConfig(correction=correction),
        num_sequences=1,
    )
    assert found.weight_T.tolist() == [2.0 if correction == "truncate" else 0.0, 0.0]

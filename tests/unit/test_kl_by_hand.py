"""KL and entropy bonus on a few tokens: values, gradients and rows worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megafork.algorithms import losses
from megafork.algorithms.regularizers import entropy_loss, kl_loss
from megafork.config import AlgorithmConfig, EntropyBonusConfig, KLConfig, MismatchConfig
from tests.helpers.loss_rows import rows_of
from tests.helpers.step import make_table

X = [0.0, math.log(2), -math.log(2), 50.0]
"""log pi - log ref of four tokens; the last is outside the reach."""
BY_HAND = {
    # value, and slope in log pi, of the first three
    "k1": ([0, math.log(2), -math.log(2)], [0, math.log(2), -math.log(2)]),
    "k2": ([0, math.log(2) ** 2 / 2, math.log(2) ** 2 / 2], [0, math.log(2), -math.log(2)]),
    "k3": ([0, 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)], [0, 1 - 0.5, 1 - 2]),
}


@pytest.mark.parametrize("estimator", BY_HAND)
def test_the_kl_by_hand(estimator):
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0])
    rows = replace(
        rows_of([1.0] * 4, [False] * 4),
        ref_logprobs_N=torch.tensor([-1.0, -2.0, -3.0, -torch.inf]),
        kl_weight_N=weight,
    )
    logprobs = torch.tensor([-1.0, -2.0, -3.0, 0.0]) + torch.tensor(X)
    logprobs.requires_grad_()
    config = KLConfig(coefficient=0.1, estimator=estimator)
    loss = kl_loss(logprobs, rows, config, denominator=10)
    loss.backward()
    value, slope = BY_HAND[estimator]
    assert loss.item() == pytest.approx(0.01 * (value[0] + value[1] / 2 + value[2] * 2), abs=1e-7)
    assert logprobs.grad.tolist() == pytest.approx(
        [0, 0.01 * slope[1] / 2, 0.01 * slope[2] * 2, 0], abs=1e-7
    )


def test_the_entropy_bonus_by_hand():
    weight = torch.tensor([1.0, 0.25, 0.0])
    rows = replace(rows_of([1.0] * 3, [False] * 3), entropy_weight_N=weight)
    entropy = torch.tensor([2.0, 4.0, torch.inf], requires_grad=True)
    config = EntropyBonusConfig(coefficient=0.5)
    loss = entropy_loss(entropy, rows, config, denominator=8)
    loss.backward()
    assert loss.item() == -0.5 * (2.0 + 1.0) / 8
    assert entropy.grad.tolist() == [-0.5 / 8, -0.125 / 8, 0.0]


def test_without_a_row_the_terms_are_connected_zeros():
    rows = rows_of([1.0] * 3, [False] * 3)
    values = torch.randn(3, requires_grad=True)
    kl = kl_loss(values, rows, KLConfig(coefficient=1.0), denominator=1)
    bonus = entropy_loss(values, rows, EntropyBonusConfig(coefficient=1.0), denominator=1)
    (kl + bonus).backward()
    assert (kl.item(), bonus.item(), values.grad.tolist()) == (0.0, 0.0, [0.0] * 3)


def test_what_the_estimators_gradients_are_on_average():
    """Over all tokens of a small vocabulary, in float64: what the module says of them."""
    torch.manual_seed(0)
    logits, other, older = torch.randn(3, 7, dtype=torch.float64)
    logits.requires_grad_()
    ref = other.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    def mean_gradient(estimator, drawn_from=None):
        """Of the loss: who draws the tokens has no gradient."""
        logprobs = logits.log_softmax(-1)
        old = logprobs.detach() if drawn_from is None else drawn_from
        rows = replace(
            rows_of([1.0] * 7, [False] * 7, old=old), ref_logprobs_N=ref, kl_weight_N=old.exp()
        )
        config = KLConfig(coefficient=1.0, estimator=estimator, ratio=drawn_from is not None)
        return gradient(kl_loss(logprobs, rows, config, denominator=1))

    logprobs = logits.log_softmax(-1)
    reverse = gradient((logprobs.exp() * (logprobs - ref)).sum())
    logprobs = logits.log_softmax(-1)
    forward = gradient((ref.exp() * (ref - logprobs)).sum())
    assert (reverse - forward).abs().max() > 0.05
    assert torch.allclose(mean_gradient("k1"), reverse)
    assert torch.allclose(mean_gradient("k2"), reverse)
    assert torch.allclose(mean_gradient("k3"), forward)
    for estimator in ("k1", "k2", "k3"):
        assert torch.allclose(mean_gradient(estimator, older.log_softmax(-1)), reverse)
    logprobs = logits.log_softmax(-1)
    plain_k1 = gradient((logprobs.exp().detach() * (logprobs - ref)).sum())
    assert plain_k1.abs().max() < 1e-15


@pytest.mark.parametrize(
    ("kl", "bonus", "needed"),
    [
        ({}, {}, [0, 1, 0, 0, 0, 0]),
        ({"tokens": "forking"}, {"tokens": "all"}, [0, 1, 0, 0, 0, 0]),  # no coefficient
        ({"coefficient": 0.1, "tokens": "forking"}, {}, [0, 1, 1, 0, 0, 0]),
        ({}, {"coefficient": 0.1, "tokens": "forking"}, [0, 1, 1, 0, 0, 0]),
        ({"coefficient": 0.1}, {}, [1, 1, 1, 1, 0, 0]),
        ({}, {"coefficient": 0.1, "tokens": "all"}, [1, 1, 1, 1, 0, 0]),
    ],
)
def test_rows_that_the_terms_need(kl, bonus, needed):
    """Of three responses of two tokens: the second has no advantage, the third is outside the
    loss; the forking tokens are the second of the first and the first of the second."""
    table = make_table()
    table = table.take((table.response_lengths_B >= 2).nonzero()[:3, 0])
    lengths = table.response_lengths_B.tolist()
    firsts = [int(o) for o in table.offsets[:-1]]
    rows = torch.tensor([first + i for first in firsts for i in range(2)])
    in_loss = table.sample_R < 2
    table = table.with_columns(advantage_R=torch.tensor([1.0, 0.0, 1.0])[table.sample_R])
    table = table.with_loss_mask(in_loss)
    found = losses.loss_rows(
        table,
        losses.ScoredRows(
            rows,
            torch.zeros(6),
            torch.tensor([False, True, True, False, False, False]),
            ref_logprobs_N=torch.zeros(6),
        ),
        losses.LossSettings(
            AlgorithmConfig(denominator="sequence_tokens"),
            MismatchConfig(),
            KLConfig(**kl),
            EntropyBonusConfig(**bonus),
        ),
        device=torch.device("cpu"),
    )
    assert found.needed_N.int().tolist() == needed
    assert found.gradient_N.tolist() == [False, True, False, False, False, False]
    share = [1 / lengths[0]] * 2 + [1 / lengths[1]] * 2 + [0.0] * 2
    for term, weight_N in ((kl, found.kl_weight_N), (bonus, found.entropy_weight_N)):
        reach = needed if "coefficient" in term else [0] * 6
        expected = [s * r for s, r in zip(share, reach, strict=True)]
        assert weight_N.tolist() == pytest.approx(expected)

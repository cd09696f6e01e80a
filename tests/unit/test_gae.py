"""Advantages and the value loss against the definition, a padded recursion, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megafork.algorithms.gae import (
    explained_variance,
    gae,
    masked_mean_and_variance,
    value_loss,
    whitened,
)
from megafork.data.sample import Group, Sample
from megafork.data.token_table import token_table
from tests.helpers import reference
from tests.helpers.ppo import by_definition


def test_three_tokens_by_hand():
    """gamma 0.5, lambda 0.5, a reward of 4 and values 1, 2, 3."""
    advantages, returns = gae(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0]), torch.tensor([0, 3]),
        gamma=0.5, gae_lambda=0.5,
    )  # fmt: skip
    # delta: 0.5 * 2 - 1, 0.5 * 3 - 2, 4 - 3; then 1, -0.5 + 0.25 * 1, 0 + 0.25 * -0.25
    assert advantages.tolist() == [-0.0625, -0.25, 1.0]
    assert returns.tolist() == [0.9375, 1.75, 4.0]


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (0.7, 1.0)]
)
def test_every_response_by_the_definition(gamma, lam):
    """Of 1 to 40 tokens, and one of none, in no order of length."""
    torch.manual_seed(0)
    lengths = [7, 1, 40, 0, 12, 40, 3, 1]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    values, rewards = torch.randn(sum(lengths)), torch.randn(len(lengths))
    advantages, returns = gae(values, rewards, offsets, gamma=gamma, gae_lambda=lam)
    expected = [
        a
        for b, reward in enumerate(rewards.tolist())
        for a in by_definition(values[offsets[b] : offsets[b + 1]].tolist(), reward, gamma, lam)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert (advantages - expected).abs().max() <= 1e-6
    assert (returns - expected - values).abs().max() <= 1e-6


def test_without_discount_the_advantage_is_the_reward_minus_the_value():
    values = torch.randn(11)
    offsets = torch.tensor([0, 4, 11])
    advantages, returns = gae(values, torch.tensor([1.0, -2.0]), offsets, gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == pytest.approx([1.0] * 4 + [-2.0] * 7, abs=1e-6)
    assert (advantages - (returns - values)).abs().max() <= 1e-6


def padded_advantages(values, scores, lengths, gamma, lam):
    """(plain, whitened): backwards over padded columns, as PPO trainers do it."""
    width = int(max(lengths))
    padded = torch.zeros(len(lengths), width, dtype=torch.float64)
    rewards = torch.zeros_like(padded)
    for b, (own, n) in enumerate(zip(values.double().split(lengths), lengths, strict=True)):
        padded[b, :n] = own
        rewards[b, n - 1] = scores[b]
    last, reversed_advantages = 0, []
    for t in reversed(range(width)):
        after = padded[:, t + 1] if t < width - 1 else 0.0
        delta = rewards[:, t] + gamma * after - padded[:, t]
        last = delta + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], axis=1)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    kept = advantages[mask]
    mean = kept.sum() / len(kept)
    variance = ((kept - mean) ** 2).sum() / len(kept) * len(kept) / (len(kept) - 1)
    return kept, (kept - mean) * torch.rsqrt(variance + 1e-8)


def test_advantages_and_whitening_as_in_ppo_trainers():
    torch.manual_seed(1)
    lengths = [5, 9, 1, 6]
    values, rewards = torch.randn(sum(lengths)), torch.randn(4)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    ours, _ = gae(values, rewards, offsets, gamma=0.98, gae_lambda=0.9)
    plain, white = padded_advantages(values, rewards, lengths, 0.98, 0.9)
    assert (ours - plain).abs().max() <= 1e-6
    of_all = masked_mean_and_variance(ours, torch.ones(21, dtype=torch.bool))
    assert (whitened(ours, *of_all) - white).abs().max() <= 1e-5


def test_whitening_looks_at_loss_tokens_alone():
    def white(advantages, mask):
        advantages, mask = torch.tensor(advantages), torch.tensor(mask)
        return whitened(advantages, *masked_mean_and_variance(advantages, mask))

    mask = [True, True, False, True]
    kept = white([1.0, 2.0, 1e6, 3.0], mask)[torch.tensor(mask)]
    assert kept.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)
    assert white([5.0, 1.0], [True, False])[0] == 0.0
    assert white([1.0, 1.0, 1.0], [False] * 3).isfinite().all()


def test_the_value_loss_by_hand():
    """Inside the clip; beyond it, towards the return; beyond it, away from it; at the edge."""
    values = torch.tensor([1.1, 2.0, 2.0, 1.2], requires_grad=True)
    old = torch.tensor([1.0, 1.0, 1.0, 1.0])
    returns = torch.tensor([3.0, 3.0, 0.0, 3.0])
    loss, clipped = value_loss(values, old, returns, clip=0.25, denominator=10)
    # 1.9^2; max(1, (1.25 - 3)^2); max(4, 1.25^2); 1.8^2
    assert float(loss) == pytest.approx(0.5 * (3.61 + 3.0625 + 4.0 + 3.24) / 10)
    assert clipped.tolist() == [False, True, False, False]
    loss.backward()
    assert values.grad.tolist() == pytest.approx([-0.19, 0.0, 0.2, -0.18])
    plain, none = value_loss(values.detach(), old, returns, clip=None, denominator=10)
    assert float(plain) == pytest.approx(0.5 * (3.61 + 1.0 + 4.0 + 3.24) / 10)
    assert not none.any()


def test_a_value_loss_of_nothing_is_connected():
    values = torch.zeros(0, requires_grad=True)
    loss, _ = value_loss(values, torch.zeros(0), torch.zeros(0), clip=0.2, denominator=1)
    loss.backward()
    assert float(loss) == 0.0 and values.grad.shape == (0,)


def test_explained_variance():
    returns, mask = torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([True, True, True, False])
    assert explained_variance(returns + 7.0, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(4), returns, mask) == pytest.approx(0.0)
    assert explained_variance(3.0 - returns, returns, mask) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(torch.zeros(4), torch.ones(4), mask))  # nothing to explain


def test_advantages_of_a_table_go_with_its_rows():
    """A mini-batch takes each token's own; equal ones were all that a table could hold."""
    table = token_table(reference.make_groups(4, 3, seed=2))
    assert table.advantage_R.isnan().all() and len(table.advantage_R) == table.num_rows
    table = table.with_columns(advantage_R=torch.arange(table.num_rows).float())
    taken = table.take([5, 0])
    assert taken.advantage_R.tolist() == [
        *range(table.rows(5).start, table.rows(5).stop),
        *range(table.rows(0).stop),
    ]


def test_a_truncated_response_ends_with_its_reward():
    """Its last token is worth what it got, not what the critic hopes for."""
    samples = [Sample(0, [4, 5], [0.0, 0.0], truncated=True, reward=-1.0)]
    table = token_table([Group(0, [3], 0, samples)])
    advantages, returns = gae(
        torch.tensor([0.5, 10.0]), table.reward_B, table.offsets, gamma=1.0, gae_lambda=0.0
    )
    assert returns[1] == -1.0
    assert advantages.tolist() == [9.5, -11.0]

"""Advantages and selection against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megafork.algorithms.advantages import group_advantages
from megafork.algorithms.forking import random_scores, select_tokens, warn_of_ties
from megafork.algorithms.rules import Tokens
from megafork.config import ForkingConfig


def test_ties_that_keep_too_much_are_told():
    assert warn_of_ties(0.215, 0.2, rho=0.2) is None
    assert "asks for 20.0% of the tokens, but 85.0% were kept" in warn_of_ties(0.85, 0.2, rho=0.2)
    assert warn_of_ties(0.8, 0.8, rho=0.2) is None
    assert warn_of_ties(0.7, 0.8, rho=0.2) is not None


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0, 0.0])
    groups = torch.tensor([7, 3, 7, 3, 3, 7])
    # group 7: 1, 0, 0: mean 1/3, deviation sqrt(1/3); group 3: 0, 5, 5: mean 10/3, sqrt(25/3)
    root = math.sqrt(3)
    expected = [2 / 3 * root, -2 / root, -root / 3, 1 / root, 1 / root, -root / 3]
    got = group_advantages(rewards, groups, normalize=True)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    centred = group_advantages(rewards, groups, normalize=False)
    assert centred.tolist() == pytest.approx([2 / 3, -10 / 3, -1 / 3, 5 / 3, 5 / 3, -1 / 3])


def test_equal_rewards_have_no_advantage():
    got = group_advantages(torch.ones(4), torch.zeros(4), normalize=True)
    assert got.tolist() == [0.0] * 4


ENTROPY = torch.tensor([0.0, 3.0, 1.0, 2.0, 9.0, 0.5])
IN_LOSS = torch.tensor([True, True, True, True, False, True])
KEYS = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], 1)


def tokens_of(entropy, in_loss, keys, num_sequences=None):
    """Tokens of which selection alone is asked; a sequence for each sample uid."""
    zeros = torch.zeros_like(entropy)
    return Tokens(
        entropy_T=entropy,
        logprobs_T=zeros,
        rollout_logprobs_T=zeros,
        ref_logprobs_T=None,
        token_T=zeros.long(),
        advantages_T=zeros,
        loss_mask_T=in_loss,
        key_T2=keys,
        length_T=torch.ones_like(keys[:, 0]),
        reward_T=zeros,
        sequence_T=keys[:, 0],
        num_sequences=num_sequences or int(keys[:, 0].max()) + 1,
        groups=(),
    )


def select(**config):
    tokens = tokens_of(ENTROPY, IN_LOSS, KEYS)
    return select_tokens(tokens, ForkingConfig(**config), seed=1, step=2, boundary_eps=1e-5)


def test_top_and_bottom_are_complements():
    top, bottom = select(select="top", rho=0.4), select(select="bottom", rho=0.4)
    assert top.mask_T.tolist() == [False, True, False, True, False, False]
    assert (top.threshold, top.num_kept, top.num_total) == (2.0, 2, 5)
    assert torch.equal(bottom.mask_T, IN_LOSS & ~top.mask_T)
    assert (bottom.num_kept, bottom.kept_fraction) == (3, 0.6)


@pytest.mark.parametrize("scope", ["minibatch", "batch", "sequence"])
def test_the_fraction_is_the_steps(scope):
    """Ten tokens of one sequence, 0 to 9 nats; 0.4 at step 1, 0.15 at step 6 and later."""
    keys = torch.stack([torch.zeros(10).long(), torch.arange(10)], 1)
    config = ForkingConfig(rho=0.4, rho_end=0.15, rho_steps=6, scope=scope)

    def kept(step):
        tokens = tokens_of(torch.arange(10.0), torch.ones(10).bool(), keys)
        found = select_tokens(tokens, config, seed=0, step=step)
        assert found.num_wanted == found.num_kept
        return found.mask_T.nonzero()[:, 0].tolist()

    # ceil of 4, 3.5, 3, 2.5, 2, 1.5
    assert [len(kept(step)) for step in range(1, 9)] == [4, 4, 3, 3, 2, 2, 2, 2]
    assert kept(3) == [7, 8, 9]


# Seven tokens; the three of the second response were cut and are out of the loss.
POPULATION = torch.tensor([5.0, 4.0, 1.0, 0.0, 9.0, 8.0, 4.0])
CUT = torch.tensor([False, False, False, False, True, True, True])


def select_of(population, seed=0, **config):
    keys = torch.stack([CUT.long(), torch.arange(7)], 1)
    config = ForkingConfig(population=population, **config)
    tokens = tokens_of(POPULATION, ~CUT, keys)
    return select_tokens(tokens, config, seed=seed, step=1, boundary_eps=1e-5)


def test_the_population_may_have_the_filtered_responses_too():
    loss = select_of("loss", rho=0.5)  # 2 of 5, 4, 1, 0
    assert loss.mask_T.tolist() == [True, True] + [False] * 5
    assert (loss.threshold, loss.num_kept, loss.num_total) == (4.0, 2, 4)
    response = select_of("response", rho=0.4)  # 3 of 9, 8, 5, 4, 4, 1, 0
    assert response.mask_T.tolist() == [True] + [False] * 6
    assert (response.threshold, response.num_kept, response.num_total) == (5.0, 3, 7)
    rest = select_of("response", rho=0.4, select="bottom")
    assert rest.mask_T.tolist() == [False, True, True, True, False, False, False]
    assert (rest.num_kept, rest.num_wanted) == (4, 4)
    tied = select_of("response", rho=0.5)  # 4 of them: both 4s are kept, one of them is cut
    assert tied.mask_T.tolist() == [True, True] + [False] * 5
    assert (tied.num_kept, tied.num_wanted, tied.num_boundary) == (5, 4, 2)
    everything = select_of("response", select="all")
    assert torch.equal(everything.mask_T, ~CUT)


def test_ties_of_the_population_are_broken_over_all_of_it():
    """One of the two 4s fills the fourth place: the one in the loss, or the other."""
    taken = set()
    for seed in range(16):
        exact = select_of("response", seed=seed, rho=0.5, ties="hash")
        assert (exact.num_kept, exact.num_wanted) == (4, 4)
        assert exact.mask_T[[0, 2, 3, 4, 5, 6]].tolist() == [True] + [False] * 5
        taken.add(bool(exact.mask_T[1]))
    assert taken == {True, False}


def test_all_keeps_the_loss_mask():
    everything = select(select="all")
    assert torch.equal(everything.mask_T, IN_LOSS)
    assert everything.kept_fraction == 1.0


def test_boundary_counts_company_at_the_threshold():
    entropy = torch.tensor([1.0, 1.0 + 5e-6, 1.0 - 5e-6, 0.0, 0.1])
    keys = torch.stack([torch.zeros(5).long(), torch.arange(5)], 1)
    tokens = tokens_of(entropy, torch.ones(5).bool(), keys)
    crowded = select_tokens(tokens, ForkingConfig(rho=0.4), seed=0, step=0, boundary_eps=1e-5)
    assert crowded.num_boundary == 3
    assert select(rho=0.4).num_boundary == 0


def collapsed(num_tokens, share_of_zeros):
    """Entropies of a policy that has nearly stopped to explore, and their keys."""
    entropy = torch.rand(num_tokens, generator=torch.Generator().manual_seed(1)) + 0.1
    entropy[: int(share_of_zeros * num_tokens)] = 0.0
    keys = torch.stack([torch.arange(num_tokens) // 100, torch.arange(num_tokens) % 100], 1)
    return entropy, keys


@pytest.mark.parametrize("select", ["top", "bottom"])
def test_ties_by_hash_keep_exactly_k(select):
    entropy, keys = collapsed(100_000, 0.85)
    tokens = tokens_of(entropy, torch.ones(100_000).bool(), keys)
    keep = select_tokens(tokens, ForkingConfig(rho=0.2, select=select), seed=0, step=0)
    config = ForkingConfig(rho=0.2, ties="hash", select=select)
    exact = select_tokens(tokens, config, seed=0, step=0)
    wanted = {"top": 20_000, "bottom": 80_000}[select]
    assert keep.num_kept == int(keep.mask_T.sum()) == {"top": 100_000, "bottom": 0}[select]
    assert keep.num_wanted == exact.num_wanted == wanted
    assert exact.num_kept == int(exact.mask_T.sum()) == wanted
    top = exact.mask_T if select == "top" else ~exact.mask_T
    assert top[85_000:].all()  # none above the threshold was left out
    drawn = top[:85_000].nonzero()[:, 0].float()
    assert abs(float(drawn.mean()) - 42_500) < 5 * 85_000 / math.sqrt(12 * 5000)  # spread evenly


def test_ties_by_hash_are_a_function_of_the_key():
    entropy, keys = collapsed(1000, 0.9)
    config = ForkingConfig(rho=0.2, ties="hash")

    def chosen(order, step):
        tokens = tokens_of(entropy[order], torch.ones(1000).bool(), keys[order])
        mask = select_tokens(tokens, config, seed=0, step=step).mask_T
        return {tuple(key) for key in keys[order][mask].tolist()}

    in_order, shuffled = torch.arange(1000), torch.randperm(1000)
    assert chosen(in_order, 1) == chosen(shuffled, 1) != chosen(in_order, 2)


@pytest.mark.parametrize("ties", ["keep", "hash"])
def test_every_sequence_has_its_own_threshold(ties):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 0, 50, 7])
    sequence = torch.repeat_interleave(torch.arange(5), lengths)
    entropy = (torch.rand(62, generator=generator) * 6).round() / 6  # with ties
    in_loss = sequence != 4  # a response that overlong filtering took out
    keys = torch.stack([sequence, torch.arange(62)], 1)
    tokens = tokens_of(entropy, in_loss, keys, num_sequences=5)
    found = select_tokens(tokens, ForkingConfig(scope="sequence", ties=ties), seed=0, step=0)
    thresholds = []
    for s, k in ((0, 1), (1, 1), (3, 10)):
        inside = sequence == s
        thresholds.append(entropy[inside].sort(descending=True).values[k - 1])
        if ties == "keep":
            assert torch.equal(found.mask_T[inside], entropy[inside] >= thresholds[-1])
        else:
            assert int(found.mask_T[inside].sum()) == k
            assert found.mask_T[inside][entropy[inside] > thresholds[-1]].all()
    assert not found.mask_T[~in_loss].any()
    assert found.threshold == pytest.approx(float(torch.stack(thresholds).mean()))
    assert found.num_wanted == 12
    assert found.num_kept == int(found.mask_T.sum())


def test_random_selection_is_a_function_of_the_key():
    keys = torch.stack([torch.arange(1000) // 10, torch.arange(1000) % 10], 1)
    config = ForkingConfig(select="random", rho=0.2)
    everything = torch.ones(1000).bool()

    def chosen(order, step):
        tokens = tokens_of(torch.zeros(1000), everything, keys[order])
        mask = select_tokens(tokens, config, seed=3, step=step).mask_T
        return {tuple(key) for key in keys[order][mask].tolist()}

    in_order, shuffled = torch.arange(1000), torch.randperm(1000)
    assert chosen(in_order, 1) == chosen(shuffled, 1)
    assert len(chosen(in_order, 1)) == 200
    overlap = len(chosen(in_order, 1) & chosen(in_order, 2))
    assert 15 <= overlap <= 70  # 40 expected of two independent draws


def test_random_scores_are_uniform():
    keys = torch.stack([torch.arange(20000), torch.arange(20000) % 50], 1)
    scores = random_scores(keys, seed=0, step=0)
    counts = torch.histc(scores, bins=20, min=0, max=1)
    assert scores.min() >= 0
    assert scores.max() < 1
    assert (counts - 1000).abs().max() < 150  # 5 standard deviations

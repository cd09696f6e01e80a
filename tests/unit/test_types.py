"""The token table: rows follow keys, whatever the order of arrival."""

from __future__ import annotations

import random

import torch

from megafork.data.sample import Group, Sample
from megafork.data.token_table import hash64, token_table
from tests.helpers import reference


def rows_by_key(table):
    columns = zip(
        table.key_R.tolist(),
        table.token_R.tolist(),
        table.rollout_logprob_R.tolist(),
        table.loss_mask_R.tolist(),
        table.policy_version_R.tolist(),
        table.sample_R.tolist(),
        strict=True,
    )
    return {
        tuple(key): (token, logprob, mask, version, table.prompt(sample).tolist())
        for key, token, logprob, mask, version, sample in columns
    }


def small_table():
    groups = [
        Group(0, [5, 6], 3, [Sample(0, [1, 2], [-0.5, -1.0], False, 1.0, 1.0),
                             Sample(1, [3], [-2.0], True)]),
        Group(1, [7], 4, [Sample(2, [8, 9, 1], [-1.0, -2.0, -3.0], False, 0.5, 0.0)]),
    ]  # fmt: skip
    return token_table(groups, overlong_filtering=True)


def test_rows_and_keys():
    table = small_table()
    assert table.key_R.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]]
    assert table.token_R.tolist() == [1, 2, 3, 8, 9, 1]
    assert table.policy_version_R.tolist() == [3, 3, 3, 4, 4, 4]
    assert table.loss_mask_R.tolist() == [True, True, False, True, True, True]
    assert table.num_loss_tokens == 5
    assert table.group_B.tolist() == [0, 0, 1]
    assert table.prompt(2).tolist() == [7]
    assert table.reward_B.tolist() == [1.0, 0.0, 0.5]


def test_without_overlong_filtering_every_row_is_in_the_loss():
    groups = [Group(0, [5], 0, [Sample(0, [1, 2], [0.0, 0.0], True)])]
    assert token_table(groups).num_loss_tokens == 2


def test_take_keeps_rows_with_their_keys():
    table = token_table(reference.make_groups(5, 3))
    order = [7, 0, 14, 3]
    taken = table.take(order)
    assert taken.uid_B.tolist() == order
    everything = rows_by_key(table)
    rows = rows_by_key(taken)
    assert rows == {key: row for key, row in everything.items() if key[0] in order}
    assert rows


def test_minibatches_depend_on_keys_and_seed_only():
    groups = reference.make_groups(9, 2)
    shuffled = groups.copy()
    random.Random(1).shuffle(shuffled)

    def split(groups, seed):
        return token_table(groups).minibatches(4, seed)

    ours, theirs = split(groups, 0), split(shuffled, 0)
    assert [m.num_samples for m in ours] == [8, 8, 2]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.uid_B, b.uid_B)
        assert torch.equal(a.token_R, b.token_R)
    members = [set(m.group_B.tolist()) for m in ours]
    assert set.union(*members) == set(range(9))
    assert [set(m.group_B.tolist()) for m in split(groups, 1)] != members


def test_a_group_has_signal_by_accuracy_not_by_reward():
    def group(*pairs):
        return Group(
            0, [1], 0, [Sample(i, [1], [0.0], False, r, a) for i, (r, a) in enumerate(pairs)]
        )

    assert not group((0.1, 0.0), (0.9, 0.0)).has_signal
    assert not group((0.5, 1.0), (1.0, 1.0)).has_signal
    assert group((0.5, 0.0), (0.5, 1.0)).has_signal


def test_hash64_is_splitmix64():
    """First outputs of the published generator seeded with 0 and 1 (splitmix64 of x is the
    generator's next value from state x)."""
    from megafork.data.token_table import _splitmix

    expected = [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    got = [int(v) & (2**64 - 1) for v in _splitmix(torch.tensor([0, 1]))]
    assert got == expected


def test_hash64_mixes_its_parts():
    values = hash64(torch.tensor(3), torch.arange(10_000))
    assert len(values.unique()) == 10_000
    assert abs((values > 0).float().mean() - 0.5) < 0.02
    assert hash64(torch.tensor(1), torch.tensor(2)) != hash64(torch.tensor(2), torch.tensor(1))

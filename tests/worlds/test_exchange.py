"""Rows of the token table go to the ranks that work on them; nothing depends on where they lie."""

from __future__ import annotations

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.training.exchange import redistribute
from tests.helpers import reference
from tests.helpers.step import make_policy, make_table, whole_gradients
from tools.benchmarks.ranks import run_ranks

LAYOUTS = [
    {},
    {"dp": 2},
    {"dp": 3},
    {"tp": 2, "dp": 2},
    {"pp": 2, "dp": 2},
    {"tp": 2, "sequence_parallel": True, "cp": 2, "dp": 2},
]


def columns(table):
    """Each held row by its key."""
    rows = zip(
        table.token_R.tolist(),
        table.rollout_logprob_R.tolist(),
        table.policy_version_R.tolist(),
        table.loss_mask_R.tolist(),
        strict=True,
    )
    return dict(zip(map(tuple, table.key_R.tolist()), rows, strict=True))


def whole():
    table = make_table()
    versions_R = torch.arange(table.num_rows) % 5
    table = table.with_columns(policy_version_R=versions_R)
    return table.with_loss_mask(table.sample_R % 3 != 1)


def moved(topology, replica_B, *, scattered):
    """The table from rank 0, or from wherever the samples lie: every third at the same replica."""
    table = whole()
    source_B = torch.zeros(table.num_samples, dtype=torch.int64)
    if scattered:
        source_B = torch.arange(table.num_samples) % topology.dp_size
    mine_B = source_B == topology.dp_rank
    if not topology.is_replica_leader:
        mine_B = torch.zeros_like(mine_B)
    rows = table.rows_of(mine_B.nonzero()[:, 0])
    held = ("token_R", "rollout_logprob_R", "policy_version_R", "loss_mask_R", "advantage_R")
    held = table.with_rows(mine_B, **{name: getattr(table, name)[rows] for name in held})
    return redistribute(held, source_B, replica_B, topology)


def one_update(folder, layout, scattered):
    """With all rows on every rank, and with those that were sent: rows and what came of them."""
    policy = make_policy(folder, layout, micro_batch_tokens=40)
    found = []
    for sent in (False, True):
        table = whole()
        if sent:
            replica_B = policy.replicas(table)
            replica_B[7] = -1  # wanted by nobody
            table = moved(policy.topology, replica_B, scattered=scattered)
            assert table.held_B.equal(replica_B == policy.topology.dp_rank)
            rows = columns(table)
            replica_B[7] = policy.replicas(whole())[7]
            table = moved(policy.topology, replica_B, scattered=scattered)
        table = table.with_columns(advantage_R=make_table().advantage_R[_whole_rows(table)])
        scores = policy.score(table)
        [mask], selection = policy.select([table], [scores], step=1)
        policy.accumulate_gradients(table, scores, mask)
        found.append((table.key_R[scores.rows_N], mask, selection, whole_gradients(policy)))
    return rows, found


def _whole_rows(table):
    """Where a table's rows are in the whole one."""
    return whole().rows_of(table.held_B.nonzero()[:, 0])


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_does_not_depend_on_where_the_rows_lie(tmp_path, layout, scattered):
    folder = reference.save_model(tmp_path / "model", tied=False, seed=3)
    world = ParallelConfig(**layout).world_size
    everything = columns(whole())
    uid = int(whole().uid_B[7])
    held = []
    for rows, ((keys, mask, selection, gradients), ours) in run_ranks(
        world, one_update, folder, layout, scattered
    ):
        assert rows.items() <= everything.items()
        held += rows
        assert torch.equal(ours[0], keys) and torch.equal(ours[1], mask)
        assert (ours[2] is None) == (selection is None)
        if selection is not None:
            assert ours[2].threshold == selection.threshold
            assert ours[2].num_total == selection.num_total
        assert gradients.keys() == ours[3].keys()
        assert all(torch.equal(g, ours[3][name]) for name, g in gradients.items())
    times = ParallelConfig(**layout).model_parallel_size
    wanted = [key for key in everything if key[0] != uid]
    assert sorted(held) == sorted(wanted * times)

"""Rows of a batch go to the ranks that work on them; nothing depends on where those are."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from megafork.config import ParallelConfig
from megafork.data.sample import Group, Sample
from megafork.data.token_table import known_table, token_table
from megafork.rollout.collector import RolloutBatch
from megafork.trainer.rows import fetch_rows
from tests.helpers import reference
from tests.helpers.controllers import controller
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


def make_groups():
    """The table of tests/helpers/step.py as groups; every third response is truncated."""
    table = make_table()
    samples = []
    for b in range(table.num_samples):
        rows = table.rows(b)
        length = rows.stop - rows.start
        versions = [(3, 0), (5, length // 2)] if b % 2 and length > 1 else []
        samples.append(
            Sample(
                int(table.uid_B[b]),
                table.token_R[rows].numpy(),
                table.rollout_logprob_R[rows].numpy(),
                truncated=b % 3 == 1,
                reward=float(table.reward_B[b]),
                versions=versions,
            )
        )
    return [
        Group(
            int(index),
            table.prompt((table.group_B == index).nonzero()[0, 0]).tolist(),
            3,
            [s for s, g in zip(samples, table.group_B.tolist(), strict=True) if g == index],
        )
        for index in table.group_B.unique()
    ]


def whole():
    return token_table(make_groups(), overlong_filtering=True)


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


@contextlib.contextmanager
def served(mesh):
    """The controller that has the batch; None on ranks that do not ask."""
    batch = RolloutBatch(groups=make_groups())

    def rows(asked, arrays):
        assert asked["step"] == 7
        return {"kind": "rows"}, batch.rows(arrays["uids"].tolist())

    with controller(mesh, None, rows) as handle:
        yield handle if mesh.is_replica_leader else None


def one_update(folder, layout):
    """With all rows on every rank, and with those that were fetched: rows and what came of them."""
    policy = make_policy(folder, layout, micro_batch_tokens=40)
    mesh, found = policy.mesh, []
    known = known_table(make_groups(), overlong_filtering=True)
    with served(mesh) as source:
        for is_fetched in (False, True):
            table = whole()
            if is_fetched:
                replica_B = policy.replicas(table)
                replica_B[7] = -1  # wanted by nobody
                table = fetch_rows(known, replica_B, 7, source, mesh)
                assert table.held_B.equal(replica_B == mesh.dp_rank)
                rows = columns(table)
                replica_B[7] = policy.replicas(whole())[7]
                table = fetch_rows(known, replica_B, 7, source, mesh)
            advantage_R = make_table().advantage_R[whole().rows_of(table.held_B.nonzero()[:, 0])]
            table = table.with_columns(advantage_R=advantage_R)
            scores = policy.score(table)
            [mask], selection = policy.select([table], [scores], step=1)
            policy.accumulate_gradients(table, scores, mask)
            found.append((table.key_R[scores.rows_N], mask, selection, whole_gradients(policy)))
    return rows, found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_does_not_depend_on_where_the_rows_are(tmp_path, layout):
    folder = reference.save_model(tmp_path / "model", tied=False, seed=3)
    world = ParallelConfig(**layout).world_size
    everything = columns(whole())
    uid = int(whole().uid_B[7])
    held = []
    for rows, ((keys, mask, selection, gradients), ours) in run_ranks(
        world, one_update, folder, layout
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


def test_versions_are_those_of_each_token():
    batch = RolloutBatch(groups=make_groups())
    uids = [sample.uid for group in batch.groups for sample in group.samples]
    runs = batch.rows(uids)["runs"][0].reshape(-1, 2)
    assert np.repeat(*runs.T).tolist() == whole().policy_version_R.tolist()
    assert {3, 5} == set(whole().policy_version_R.tolist())

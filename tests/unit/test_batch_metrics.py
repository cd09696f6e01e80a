"""The numbers of a rollout batch, against counts by hand."""

from __future__ import annotations

import math

import pytest

from megafork.data.sample import Group, Sample
from megafork.rollout.batch_metrics import lag_metrics, overlap_metrics, rollout_metrics
from megafork.rollout.collector import RolloutBatch


def sample(num_tokens: int, **more) -> Sample:
    return Sample(0, [1] * num_tokens, [0.0] * num_tokens, more.pop("truncated", False), **more)


OLD = Group(0, [], 2, [sample(4, accuracy=1.0, reward=1.0), sample(2, versions=((2, 0), (3, 1)))])
NEW = Group(1, [], 3, [sample(6, accuracy=1.0, reward=0.5), sample(8, truncated=True)])
DROPPED = Group(
    2,
    [],
    3,
    [
        sample(1, failure="timeout"),
        sample(1, failure="timeout"),
        sample(2, failure="memory", reward=math.inf),
        sample(2, failure="error", reward=math.nan),
    ],
)


def test_a_batch_with_a_dropped_group():
    batch = RolloutBatch([OLD, NEW], [OLD, NEW, DROPPED], num_dropped=1, lost_lengths=[10, 20])
    assert rollout_metrics(batch, 3) == {
        "sampling/groups_dropped": 1,
        "sampling/groups_stale": 0,
        "sampling/stale_fraction": 0.5,
        "sampling/tail_groups": 0,
        "sampling/lost_length_mean": 15.0,
        "sampling/length_bias": pytest.approx(20 / 4 - 50 / 6),
        "reward/mean": 0.25,
        "reward/nonfinite": 2,
        "reward/timeouts": 2,
        "reward/out_of_memory": 1,
        "reward/worker_deaths": 0,
        "reward/verifier_errors": 1,
        "reward/accuracy": 0.25,
        "response/length_mean": 26 / 8,
        "response/truncated_fraction": 0.125,
    }


def test_carried_groups_fill_a_batch_alone():
    metrics = rollout_metrics(RolloutBatch([NEW]), 3)
    assert metrics["response/length_mean"] == 7.0
    assert math.isnan(metrics["sampling/lost_length_mean"])
    assert metrics["sampling/length_bias"] == 0.0


def test_how_far_tokens_are_behind():
    expected = {"lag/mean": 5 / 20, "lag/max": 1, "lag/in_flight_fraction": 0.25}
    assert lag_metrics([OLD, NEW], 3) == expected


@pytest.mark.parametrize(("waited", "hidden"), [(2.0, 3.0), (6.0, 0.0)])
def test_generation_that_a_step_did_not_wait_for(waited, hidden):
    seconds = {"generate": waited, "total": 10.0}
    assert overlap_metrics(RolloutBatch(seconds=5.0), seconds) == {
        "overlap/generation_seconds": 5.0,
        "overlap/hidden_seconds": hidden,
        "overlap/gain": (10.0 + hidden) / 10.0,
    }

"""The mismatch of trainer and engine, over the ranks that hold the tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.trainer.entropy_record import entropy_record
from megafork.trainer.outcome import Optimized
from tests.helpers import reference
from tests.helpers.step import make_policy, make_table
from tools.benchmarks.ranks import run_ranks

CURRENT = 7


def make_mismatched():
    """Responses of samples 0 to 4 are of an older policy version and far off."""
    table = make_table()
    stale = table.sample_R < 5
    offset = 0.3 * torch.sin(torch.arange(table.num_rows) * 0.7)
    versions = torch.where(stale, CURRENT - 1, CURRENT)
    rollout = torch.full((table.num_rows,), -2.0) + torch.where(stale, 50.0, offset)
    return table.with_columns(rollout_logprob_R=rollout, policy_version_R=versions)


def measure(folder, layout, version):
    policy = make_policy(folder, layout, mismatch={"large_difference": 0.1})
    table = make_mismatched()
    scores = policy.score(table)
    [mask], selection = policy.select([table], [scores], step=1)
    scores = replace(scores, old_logprobs_N=torch.full_like(scores.old_logprobs_N, -2.0))
    done = Optimized([table], [scores], [mask], selections=[selection])
    return entropy_record(policy, done, policy_version=version, step=1).metrics


@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"pp": 2, "cp": 2}], ids=str)
def test_mismatch_is_measured_over_the_fresh_tokens(tmp_path, layout):
    folder = reference.save_model(tmp_path, tied=False, seed=3)
    table = make_mismatched()
    k1 = (table.rollout_logprob_R + 2.0)[table.policy_version_R == CURRENT].double()
    expected = {
        "mismatch/k1": k1.mean(),
        "mismatch/kl": ((-k1).exp() - 1 + k1).mean(),
        "mismatch/mean_difference": k1.abs().mean(),
        "mismatch/max_difference": k1.abs().max(),
        "mismatch/large_fraction": (k1.abs() > 0.1).double().mean(),
    }
    assert 0.2 < expected["mismatch/large_fraction"] < 0.9
    world = ParallelConfig(**layout).world_size
    for metrics in run_ranks(world, measure, folder, layout, CURRENT):
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), abs=1e-6), name


def test_without_a_fresh_token_there_is_no_mismatch(tmp_path):
    folder = reference.save_model(tmp_path, tied=False, seed=3)
    [metrics] = run_ranks(1, measure, folder, {}, CURRENT + 1)
    assert math.isnan(metrics["mismatch/max_difference"])
    assert math.isnan(metrics["mismatch/k1"])

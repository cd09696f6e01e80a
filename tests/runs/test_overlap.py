"""Batches whose tail later batches train on: how old a token may be, and that no chance decides.

test_resume_layouts.py has a run whose batches are generated one step ahead.
"""

from __future__ import annotations

import pytest

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.rollout.journal import Journal
from tests.helpers.commands import QUICKSTART, left_over, tiny_run
from tests.helpers.live_runs import middle_of
from tests.helpers.replays import (
    assert_kept,
    comparable,
    journalled,
    replayed_in_one_go,
    resume,
)

SETTINGS = ("training.steps=5", "eval.prompts=8", "sync.check_every=1", "sync.check_prompts=2")
CARRYING = ("rollout.tail=carry", "rollout.oversampling=3", "rollout.max_policy_lag=2")


def test_settings_that_contradict_each_other():
    def load(*overrides):
        return load_config(TrainConfig, QUICKSTART / "config.toml", overrides)

    with pytest.raises(UserError, match=r"rollout.max_policy_lag=0 trains on none of those"):
        load("rollout.tail=carry")
    with pytest.raises(UserError, match=r"max_policy_lag=1 .* or seeded=false"):
        load("rollout.seeded=true", "rollout.max_policy_lag=1")
    with pytest.raises(UserError, match=r"rollout.tail=abort: use max_policy_lag=0"):
        load("rollout.seeded=true", "rollout.tail=abort")
    assert load("rollout.tail=carry", "rollout.max_policy_lag=1").rollout.tail == "carry"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_killed_run_with_carried_tails_goes_on_as_if_it_had_not_been(tmp_path):
    run_dir = tmp_path / "run"
    settings = (*SETTINGS, *CARRYING, "checkpoint.every=1")
    with middle_of(4, run_dir, *tiny_run(run_dir, *settings)) as (run, _):
        run.wait_for((run_dir / "checkpoints" / "step_000002").exists)
        run.kill()
    assert left_over(run_dir, seconds=10) == []
    before = journalled(run_dir)
    resume(run_dir)
    assert_kept(run_dir, before)
    rows, weights = comparable(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert 1 <= max(row["lag/max"] for row in rows) <= 2
    assert sum(row["sampling/tail_groups"] for row in rows) > 0
    # What one batch did not wait for is young enough for a later one.
    steps = [Journal.read(run_dir / "rollouts" / f"step_{i:06d}.journal") for i in range(1, 6)]
    newest, trained = -1, 0
    for step, groups in enumerate(steps, 1):
        late = [group for group in groups if group.prompt_index <= newest]
        trained += sum(group.policy_version >= step - 2 for group in late)
        newest = max([newest, *(group.prompt_index for group in groups)])
    assert trained > 0
    other_rows, other_weights = replayed_in_one_go(run_dir, tmp_path / "replayed")
    assert rows == other_rows
    assert weights == other_weights

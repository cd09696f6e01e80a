"""A run that nothing interrupts, and that ends in the same place when it is resumed elsewhere."""

from __future__ import annotations

import shutil

import pytest

from megafork.rollout.journal import Journal
from tests.helpers.commands import left_over, lines, megafork, tiny_run
from tests.helpers.replays import TOLERANCE, comparable, final_weights, journalled, resume

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("uninterrupted run")]

STEPS, AFTER = 5, 2


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """At one rank, each step beside the next one's generation, with a checkpoint after two."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    settings = (
        f"training.steps={STEPS}",
        f"checkpoint.every={AFTER}",
        "checkpoint.keep_last=3",
        "parallel.tp=1",
        "rollout.max_policy_lag=1",
        "eval.prompts=8",
        "sync.check_every=1",
        "sync.check_prompts=2",
    )
    done = megafork(*tiny_run(run_dir, *settings), mark=run_dir)
    assert done.returncode == 0, done.stderr
    assert left_over(run_dir) == []
    return run_dir


def test_the_next_batch_is_generated_by_the_policy_before(uninterrupted):
    rows = lines(uninterrupted / "metrics.jsonl")
    assert [row["policy_version"] for row in rows] == [2, 3, 4, 5, 6]
    assert [row["lag/max"] for row in rows] == [0, 1, 1, 1, 1]
    assert rows[0]["mismatch/kl"] < 1e-9  # the engine's float32 against ours
    assert all(row["lag/kl"] > 1e-6 for row in rows[1:])  # another policy's
    assert all(row["overlap/gain"] >= 1.0 for row in rows)
    assert max(row["overlap/hidden_seconds"] for row in rows) > 0.0
    for step in range(2, STEPS + 1):
        groups = Journal.read(uninterrupted / "rollouts" / f"step_{step:06d}.journal")
        assert min(group.policy_version for group in groups) == step - 1


def as_it_was_after(step, run_dir, folder):
    """A copy of what the run had written when `step` was done, and its whole journal."""
    name = f"step_{step:06d}"
    shutil.copytree(run_dir / "rollouts", folder / "rollouts")
    shutil.copytree(run_dir / "checkpoints" / name, folder / "checkpoints" / name)
    shutil.copy(run_dir / "config.toml", folder)
    rows = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:step]))
    return folder


@pytest.mark.parametrize(
    "key", ["tp", *(pytest.param(key, marks=pytest.mark.exhaustive) for key in ("pp", "dp"))]
)
def test_another_layout_goes_on_within_rounding(tmp_path, uninterrupted, key):
    run_dir = as_it_was_after(AFTER, uninterrupted, tmp_path / "run")
    before = journalled(run_dir)
    done = resume(run_dir, f"parallel.{key}=2")
    assert f"resuming from {run_dir}/checkpoints/step_{AFTER:06d}" in done.stdout
    assert journalled(run_dir) == before  # nothing was generated
    expected, rows = (comparable(folder)[0] for folder in (uninterrupted, run_dir))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for ours, theirs in zip(expected, rows, strict=True):
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            same = value == theirs[name]  # None where nothing could be measured
            assert same or abs(value - theirs[name]) <= TOLERANCE, f"step {ours['step']}: {name}"
        assert ours["update/head_rows"] == theirs["update/head_rows"]
    weights, their_weights = (final_weights(folder) for folder in (uninterrupted, run_dir))
    assert set(their_weights) == set(weights)
    for name, weight in weights.items():
        assert (weight - their_weights[name]).abs().max() <= TOLERANCE, name

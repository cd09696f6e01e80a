"""Runs that go on, and what must be the same in a run that was never interrupted."""

from __future__ import annotations

import re
import shutil

from safetensors.torch import load_file

from megafork.rollout.journal import end_of_records
from tests.helpers.commands import left_over, lines, megafork


def journalled(run_dir):
    """Each journal's bytes; one without any says nothing."""
    found = {path.name: path.read_bytes() for path in (run_dir / "rollouts").glob("*.journal")}
    return {name: content for name, content in found.items() if content}


def assert_kept(run_dir, before, when=""):
    """What `journalled` gave is still there, but for a torn last record."""
    for name, content in before.items():
        now = (run_dir / "rollouts" / name).read_bytes()
        if not now.startswith(content):
            torn = run_dir.parent / f"before-{name}"
            torn.write_bytes(content)
            whole = end_of_records(torn)
            assert whole < len(content) and now.startswith(content[:whole]), when


def final_weights(run_dir):
    weights = {}
    for path in sorted((run_dir / "checkpoints" / "final").glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def comparable(run_dir):
    """The metrics that tell neither time nor servers lost, and the bytes of the final weights."""
    rows = [
        {
            k: v
            for k, v in row.items()
            if not re.match("time/|throughput/|overlap/|eval/|rollout/servers", k)
        }
        for row in lines(run_dir / "metrics.jsonl")
    ]
    return rows, {name: weight.numpy().tobytes() for name, weight in final_weights(run_dir).items()}


def resume(run_dir, *overrides):
    done = megafork("train", "--resume", run_dir, *overrides, mark=run_dir)
    assert done.returncode == 0, done.stderr
    assert left_over(run_dir) == []
    return done


def replayed_in_one_go(run_dir, folder, *overrides):
    """An uninterrupted run from the same journal, at the same layout: its servers say nothing."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    shutil.copy(run_dir / "config.toml", folder)
    for path in (run_dir / "rollouts").iterdir():
        shutil.copy(path, folder / "rollouts")
    before = journalled(folder)
    resume(folder, *overrides)
    assert journalled(folder) == before  # nothing was generated
    return comparable(folder)


TOLERANCE = 1e-5
"""Absolute, in float32, of every metric and every weight; measured after ten steps (forty updates)
at another layout: 2.4e-6 (a percentile of the entropies) and 3.6e-7.

A relative bound would say nothing of metrics that rounding alone makes (mismatch/kl is 1e-13) or
that cancel (loss/policy is 1e-3, from terms of 1). Two things could break this one honestly: a
token that changes sides at the threshold, which update/head_rows would show (docs/numerics.md), and
a weight whose gradient is all rounding, which Adam moves by up to the learning rate, 5e-4, either
way; neither happened. The evaluation is left out: its sampling has no seed.
"""

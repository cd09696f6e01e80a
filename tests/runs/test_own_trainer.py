"""examples/own_trainer: a loop of plain torch, and TRL's trainer with our mask."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import reference
from tests.helpers.commands import ROOT
from tests.helpers.own_trainer import MICRO_BATCHES, exact_step
from tests.helpers.trl import INSTALLED

FLOAT32 = 2e-5
"""TRL works in float32: its gradients are this close to those in float64, of the largest entry."""


def python(*arguments, path=()):
    paths = [*map(str, path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_loop_learns():
    told = python(ROOT / "examples" / "own_trainer" / "plain_loop.py")
    rewards = [float(reward) for reward in re.findall(r"reward (\d\.\d+)", told)]
    assert len(rewards) == 6 and rewards[0] < 0.2 and rewards[-1] > 0.9, told


def difference(gradients, exact):
    """The largest difference of an entry, over the largest entry of all."""
    differences = [(gradients[name] - exact[name]).abs().max() for name in exact]
    return float(max(differences) / max(gradient.abs().max() for gradient in exact.values()))


@pytest.mark.skipif(
    not (INSTALLED / "trl").is_dir(),
    reason="TRL is not in .venv/trl: run tools/setup_cpu.sh --test",
)
def test_trls_trainer_with_the_mask_of_the_whole_optimizer_batch(tmp_path, capsys):
    reference.save_model(tmp_path / "model", tied=True, seed=3)
    exact_mask, exact_gradients = exact_step(tmp_path)
    table = ["ranks  micro-batches  tokens differ: megafork  TRL   gradient differs: megafork  TRL"]
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        module = ["-m", "tests.helpers.trl_masks", tmp_path]
        python(*(launch if ranks > 1 else []), *module, path=[INSTALLED])
        steps = torch.load(tmp_path / "steps.pt")
        for num in MICRO_BATCHES:
            wrong, off = {}, {}
            for name in ("megafork", "TRL"):
                mask, gradients = steps[name, num]
                wrong[name] = int((mask ^ exact_mask).sum())
                off[name] = difference(gradients, exact_gradients)
            table.append(
                f"{ranks:5}  {num:13}  {wrong['megafork']:23}  {wrong['TRL']:3}"
                f"   {off['megafork']:26.0e}  {off['TRL']:.0e}"
            )
            assert wrong["megafork"] == 0 and off["megafork"] < FLOAT32, table
            if num > 1:  # what is shown can fail: TRL's own mask does
                assert wrong["TRL"] > 0 and off["TRL"] > 100 * FLOAT32, table
    with capsys.disabled():
        print("", f"of {int(exact_mask.sum())} tokens with a gradient", *table, sep="\n")

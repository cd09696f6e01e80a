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
from tests.helpers.trl import INSTALLED

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


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


@pytest.mark.parametrize("launch", [[], [*TORCHRUN, "2"]], ids=["alone", "two ranks"])
def test_the_plain_loop_learns(launch):
    told = python(*launch, ROOT / "examples" / "own_trainer" / "plain_loop.py")
    rewards = [float(reward) for reward in re.findall(r"reward (\d\.\d+)", told)]
    assert len(rewards) == 6 and rewards[-1] > 0.5 > rewards[0], told


@pytest.mark.skipif(
    not (INSTALLED / "trl").is_dir(),
    reason="TRL is not in .venv/trl: run tools/setup_cpu.sh --test",
)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_trls_trainer_takes_the_mask_of_the_whole_optimizer_batch(ranks, steps, tmp_path):
    reference.save_model(tmp_path / "model", tied=True, seed=3)
    launch = [*TORCHRUN, ranks] if ranks > 1 else []
    python(*launch, "-m", "tests.helpers.trl_masks", tmp_path, steps, path=[INSTALLED])
    masks = torch.load(tmp_path / "masks.pt")
    differ = {name: int((masks[name] ^ masks["exact"]).sum()) for name in ("TRL", "megafork")}
    print(
        f"{ranks} ranks, {steps} micro-batches: tokens that differ from the exact top 20%", differ
    )
    assert differ["megafork"] == 0
    if steps > 1:
        assert differ["TRL"] > 0

"""TRL's trainer with our mask (examples/own_trainer) against a sort and a gradient in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers import reference
from tests.helpers.commands import ROOT
from tests.helpers.own_trainer import MICRO_BATCHES, RANKS, exact_step
from tests.helpers.trl import INSTALLED

FLOAT32 = 2e-5
"""TRL works in float32: its gradients are this close to those in float64, of the largest entry."""


def optimizer_steps(folder):
    """What tests/helpers/trl_masks.py writes, with TRL on the path."""
    paths = [str(INSTALLED), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.trl_masks", str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "steps.pt")


def difference(gradients, exact):
    """The largest difference of an entry, over the largest entry of all."""
    differences = [(gradients[name] - exact[name]).abs().max() for name in exact]
    return float(max(differences) / max(gradient.abs().max() for gradient in exact.values()))


@pytest.mark.slow
@pytest.mark.skipif(
    not (INSTALLED / "trl").is_dir(),
    reason="TRL is not in .venv/trl: run tools/setup_cpu.sh --test",
)
def test_trls_trainer_with_the_mask_of_the_whole_optimizer_batch(tmp_path, capsys):
    reference.save_model(tmp_path / "model", tied=True, seed=3)
    exact_mask, exact_gradients = exact_step(tmp_path)
    table = ["ranks  micro-batches  tokens differ: megafork  TRL   gradient differs: megafork  TRL"]
    steps = optimizer_steps(tmp_path)
    for ranks in RANKS:
        for num in MICRO_BATCHES:
            wrong, off = {}, {}
            for name in ("megafork", "TRL"):
                mask, gradients = steps[ranks, name, num]
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

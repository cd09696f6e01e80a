"""TRL's losses on our inputs, from a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers import reference
from tests.helpers.objectives import CLIPS, engine_offset
from tests.helpers.step import (
    RHO,
    make_table,
    perturbation,
    score_all,
)

INSTALLED = Path(__file__).parents[2] / ".venv" / "trl"
PPO, GSPO = ({"objective": name} | CLIPS[name] for name in ("ppo", "gspo"))
CISPO = {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3}  # TRL has no lower bound
SEQUENCE = {"importance_sampling_level": "sequence"}


def epsilons(algorithm):
    return {"epsilon": algorithm["clip_low"], "epsilon_high": algorithm["clip_high"]}


# Our settings, TRL's, and whether a factor of single tokens (the forking mask, a token's importance
# weight) has our meaning there: with sequence ratios it weights the whole sequence's gradient.
OBJECTIVES = {
    "dapo": (PPO, {"loss_type": "dapo"} | epsilons(PPO), True),
    "bnpo": (PPO, {"loss_type": "bnpo"} | epsilons(PPO), True),
    "grpo": (
        PPO | {"denominator": "sequence_tokens"},
        {"loss_type": "grpo"} | epsilons(PPO),
        True,
    ),
    "dr-grpo": (
        PPO | {"denominator": "max_response_tokens"},
        {"loss_type": "dr_grpo"} | epsilons(PPO),
        True,
    ),
    "dual-clip": (
        PPO | {"clip_dual": 1.35},
        {"loss_type": "dapo", "delta": 1.35} | epsilons(PPO),
        True,
    ),
    "gspo": (
        GSPO | {"denominator": "sequence_tokens"},
        {"loss_type": "grpo"} | SEQUENCE | epsilons(GSPO),
        False,
    ),
    "gspo-tokens": (GSPO, {"loss_type": "bnpo"} | SEQUENCE | epsilons(GSPO), False),
    "gspo-dual-clip": (
        GSPO | {"denominator": "sequence_tokens", "clip_dual": 1.07},
        {"loss_type": "grpo", "delta": 1.07} | SEQUENCE | epsilons(GSPO),
        False,
    ),
    "cispo": (CISPO, {"loss_type": "cispo", "epsilon_high": 1 + CISPO["clip_high"]}, True),
}


OF_ALL_TOKENS = 2e-5
"""Gradients are sums over all tokens here, not over a fifth of them."""


def make_inputs(folder):
    """The table with the engine's log-probabilities, those before the update, both masks."""
    table = make_table()
    with torch.no_grad():
        logprobs, entropies = score_all(reference.load_model(folder, torch.float64), table)
    rows = torch.arange(table.num_rows)
    old = (logprobs + perturbation(rows)).float()
    table = table.with_columns(rollout_logprob_R=(old + engine_offset(rows)).float())
    top = entropies >= reference.top_threshold(entropies, RHO)
    return table, old, {"top": top, "all": torch.ones_like(top)}


def losses_of_trl(folder, output, table, old, masks, cases, ref_logprobs=None):
    """(loss, gradients) of each case (TRL's settings, mask, mismatch correction).

    In a process of its own: transformers, once imported, no longer looks for accelerate.
    """
    torch.save((folder, table, old, masks, cases, ref_logprobs), output / "inputs.pt")
    paths = [str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.trl_losses", output],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=INSTALLED.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(output / "losses.pt")

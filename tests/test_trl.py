"""Our objectives against TRL's GRPOTrainer (1.16.0, requirements/trl.txt) on the same inputs: loss
and every gradient.

TRL gets a transformers model in float64, the log-probabilities before the update, advantages,
forking mask and importance weights; megafork takes the same through Policy.update's own path. Where
TRL's formula is another one (docs/numerics.md), tests/test_objectives.py has the papers'.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megafork.config import AlgorithmConfig, MismatchConfig
from tests import reference
from tests.objectives import CLIPS, OF_SEQUENCE_WEIGHTS, TOLERANCE, engine_offset
from tests.ranks import run_ranks
from tests.step import (
    RHO,
    make_policy,
    make_table,
    perturbation,
    score_all,
    whole_gradients,
)

INSTALLED = Path(__file__).parent.parent / ".venv" / "trl"

pytestmark = pytest.mark.skipif(
    not (INSTALLED / "trl").is_dir(),
    reason="TRL is not in .venv/trl: run tools/setup_cpu.sh --test",
)
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
CORRECTIONS = (
    {},
    {"correction": "truncate", "level": "token", "max_weight": 1.3},
    {"correction": "mask", "level": "sequence", "max_weight": 1.75, "min_weight": 0.4},
)
CASES = [
    (name, select, correction)
    for name, (_, _, by_token) in OBJECTIVES.items()
    for select in (("top", "all") if by_token else ("all",))
    for correction in CORRECTIONS
    if by_token or correction.get("level", "sequence") == "sequence"
]
OF_ALL_TOKENS = 2e-5
"""Gradients are sums over all tokens here, not over a fifth of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), tied=False, seed=3)


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
        [sys.executable, "-W", "ignore", "-m", "tests.trl_losses", output],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        cwd=INSTALLED.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(output / "losses.pt")


def losses_of_ours(folder, table, old, masks):
    policy = make_policy(folder, {}, grad_clip=1e9, lr=1e-30, weight_decay=0.0, spike_factor=None)
    scores = policy.score(table)
    scores = replace(scores, old_logprobs_N=old[scores.rows_N])
    found = []
    for name, select, correction in CASES:
        policy.algorithm = AlgorithmConfig(**OBJECTIVES[name][0])
        policy.mismatch = MismatchConfig(**correction)
        metrics = policy.update(table, scores, masks[select][scores.rows_N])
        found.append((metrics, whole_gradients(policy)))
    return found


@pytest.mark.slow
def test_losses_and_gradients_are_trls(folder, tmp_path):
    table, old, masks = make_inputs(folder)
    cases = [(OBJECTIVES[name][1], select, correction) for name, select, correction in CASES]
    theirs = losses_of_trl(folder, tmp_path, table, old, masks, cases)
    [ours] = run_ranks(1, losses_of_ours, folder, table, old, masks)
    for case, (loss, expected), (metrics, gradients) in zip(CASES, theirs, ours, strict=True):
        bound = OF_SEQUENCE_WEIGHTS if case[2].get("level") == "sequence" else OF_ALL_TOKENS
        assert metrics["loss"] == pytest.approx(loss, rel=bound, abs=TOLERANCE), case
        assert set(gradients) == set(expected)
        for name, g in expected.items():
            error = (gradients[name] - g).abs().max() / g.abs().max()
            assert error <= bound, f"{case}, {name}: {error:.2e}"
    seen = {name: metrics for (name, select, _), (metrics, _) in zip(CASES, ours, strict=True)}
    assert seen["dual-clip"]["clip_dual"] > 0
    assert seen["gspo-dual-clip"]["clip_dual"] > 0
    assert all(seen[name]["clip_high"] > 0 and seen[name]["masked"] > 0 for name in seen)

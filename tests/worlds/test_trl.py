"""Our objectives against TRL's GRPOTrainer (1.16.0, requirements/trl.txt) on the same inputs: loss
and every gradient.

TRL gets a transformers model in float64, the log-probabilities before the update, advantages,
forking mask and importance weights; megafork takes the same through Policy.update's own path. Where
TRL's formula is another one (docs/numerics.md), tests/test_objectives.py has the papers'.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megafork.config import AlgorithmConfig, MismatchConfig
from tests.helpers import reference
from tests.helpers.objectives import CLIPPED, OF_SEQUENCE_WEIGHTS, TOLERANCE
from tests.helpers.step import (
    make_policy,
    whole_gradients,
)
from tests.helpers.trl import (
    INSTALLED,
    OBJECTIVES,
    OF_ALL_TOKENS,
    losses_of_trl,
    make_inputs,
)
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not (INSTALLED / "trl").is_dir(),
    reason="TRL is not in .venv/trl: run tools/setup_cpu.sh --test",
)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), tied=False, seed=3)


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
    assert seen["dual-clip"][CLIPPED["clip_dual"]] > 0
    assert seen["gspo-dual-clip"][CLIPPED["clip_dual"]] > 0
    assert all(seen[name][CLIPPED["clip_high"]] > 0 and seen[name]["masked"] > 0 for name in seen)

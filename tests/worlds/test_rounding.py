"""What bfloat16 costs: log-probabilities rounded as an engine rounds, and those of float32."""

from __future__ import annotations

import pytest
import torch

from megafork.config import ModelConfig, ParallelConfig
from megafork.data.token_table import token_table
from megafork.model.rounding import rounded_and_exact
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from tests.helpers import reference
from tools.benchmarks.ranks import run_ranks

LAYOUTS = {
    "tp1": {},
    "tp2-sp": {"tp": 2, "sequence_parallel": True},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
}


def passes(folder, layout):
    """(rows, rounded, exact) of this rank, whether its values before and after are the same bits,
    and the dtypes of its parameters after it."""
    parallel = ParallelConfig(**layout)
    mesh = initialize(parallel)
    model = ModelConfig(path=str(folder), dtype="bfloat16")
    scorer = Scorer(model, parallel, mesh, micro_batch_tokens=64, temperature=0.8)
    table = token_table(reference.make_groups(3, 3))
    before = scorer.score(table)
    rounded, exact = rounded_and_exact(scorer, table)
    after = scorer.score(table)
    unchanged = torch.equal(before.old_logprobs_N, after.old_logprobs_N)
    dtypes = {p.dtype for stage in scorer.stages for p in stage.gpt.parameters()}
    return before.rows_N, rounded, exact, unchanged, dtypes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), tied=True, layers=4)


@torch.no_grad()
def expected_logprobs(folder, dtype):
    """transformers' of bfloat16 weights, row by row."""
    model = reference.load_model(folder, torch.bfloat16).to(dtype)
    values = []
    for group in reference.make_groups(3, 3):
        for sample in group.samples:
            logits = reference.response_logits(model, group.prompt_ids, sample.token_ids)
            values.append(
                reference.logprobs_and_entropies(logits.float() / 0.8, sample.token_ids)[0]
            )
    return torch.cat(values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_exact_pass_is_float32_and_leaves_no_trace(folder, layout):
    exact, rounded = (expected_logprobs(folder, d) for d in (torch.float32, torch.bfloat16))
    cost = (rounded - exact).square().mean().sqrt()
    world = ParallelConfig(**LAYOUTS[layout]).world_size
    seen = torch.zeros(len(exact))
    for rows, ours_rounded, ours_exact, unchanged, dtypes in run_ranks(
        world, passes, folder, LAYOUTS[layout]
    ):
        assert unchanged and dtypes == {torch.bfloat16}
        seen[rows] += 1
        assert len(rows) == len(ours_exact) == len(ours_rounded)
        torch.testing.assert_close(ours_exact, exact[rows], rtol=0, atol=1e-5)
        if len(rows):
            ours_cost = (ours_rounded - exact[rows]).square().mean().sqrt()
            assert 0.5 * cost < ours_cost < 2 * cost
    assert (seen > 0).all()

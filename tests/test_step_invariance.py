"""One optimizer step is the same at every layout, and is the paper's.

The reference is plain transformers in float64, one sequence at a time, with the loss written out
from the paper: a sort for the threshold, one sum over selected tokens, one denominator.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megafork.algorithms.advantages import group_relative_advantages
from megafork.config import (
    AlgorithmConfig,
    ForkingConfig,
    ModelConfig,
    ParallelConfig,
    TrainingConfig,
)
from megafork.model.weights import export_weights
from megafork.parallel.topology import initialize
from megafork.training.policy import BOUNDARY_EPS, Policy
from megafork.types import token_table
from tests import reference
from tests.ranks import run_ranks

RHO, CLIP_LOW, CLIP_HIGH = 0.2, 0.2, 0.28
CASES = {
    "tp1": ({}, 1000),
    "tp1-small-packs": ({}, 18),
    "tp2": ({"tp": 2}, 64),
    "tp2-sp": ({"tp": 2, "sequence_parallel": True}, 64),
    "pp2": ({"pp": 2}, 64),
    "dp2": ({"dp": 2}, 64),
    "dp2-small-packs": ({"dp": 2}, 18),
    "tp2-pp2": ({"tp": 2, "pp": 2}, 64),
    "tp2-dp2": ({"tp": 2, "dp": 2}, 24),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_folder(request, tmp_path_factory):
    return reference.save_model(tmp_path_factory.mktemp("model"), tied=request.param, seed=3)


def make_table():
    table = token_table(reference.make_groups(6, 4, seed=5))
    advantages = group_relative_advantages(table.reward_B, table.group_B, normalize=True)
    return table.with_columns(advantage_B=advantages)


def perturbation(rows):
    """Moves the old log-probabilities, so that ratios differ from 1 and some are clipped."""
    return 0.4 * torch.sin(rows.float() * 1.7)


def one_step(folder, layout, budget, select="top"):
    parallel = ParallelConfig(**layout)
    policy = Policy(
        ModelConfig(path=str(folder), dtype="float32"),
        parallel,
        initialize(parallel),
        training=TrainingConfig(steps=1, micro_batch_tokens=budget, grad_clip=1e9, warmup_steps=0),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        forking=ForkingConfig(rho=RHO, select=select),
        temperature=1.0,
    )
    table = make_table()
    scores = policy.score(table)
    [mask], selection = policy.select([table], [scores], step=1)
    first = policy.accumulate_gradients(table, scores, mask)
    unperturbed = max((float(r["max_ratio_offset"]) for r in first), default=0.0)
    empty_packs = (
        sum(not part.any() for part in mask.split([len(p.rows_N) for p in scores.packs]))
        if policy.topology.is_last_stage
        else 0
    )
    old = scores.old_logprobs_N + perturbation(scores.rows_N)
    shifted = replace(scores, old_logprobs_N=old)
    policy.accumulate_gradients(table, shifted, mask)
    whole_gradients(policy)
    gradients = {
        name: value.clone()
        for name, value in export_weights(
            policy.gpt, policy.rules, policy.topology, lambda p: p.main_grad
        )
    }
    metrics = policy.update(table, shifted, mask)
    return {
        "rows": scores.rows_N,
        "mask": mask,
        "entropy": scores.entropy_N,
        "selection": selection,
        "gradients": gradients,
        "metrics": metrics,
        "unperturbed_offset": unperturbed,
        "empty_packs": empty_packs,
    }


def whole_gradients(policy):
    """The distributed optimizer leaves each data-parallel rank its shard: put them together."""
    group = policy.topology.groups.dp_cp
    for buffer in policy.model.buffers:
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(policy.topology.dp_size))
            torch.distributed.all_gather(
                shards, shards[policy.topology.dp_rank].clone(), group=group
            )


def reference_step(folder):
    model = reference.load_model(folder, torch.float64)
    table = make_table()
    logprobs, entropies = [], []
    for b in range(table.num_samples):
        response = table.token_R[table.rows(b)].tolist()
        z = reference.response_logits(model, table.prompt(b).tolist(), response)
        lp, h = reference.logprobs_and_entropies(z, response)
        logprobs.append(lp)
        entropies.append(h.detach())
    logprobs, entropies = torch.cat(logprobs), torch.cat(entropies)
    tau = reference.top_threshold(entropies, RHO)
    mask = entropies >= tau
    ratio = (logprobs - logprobs.detach() - perturbation(torch.arange(len(logprobs)))).exp()
    advantage = table.advantage_R.double()
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    loss = -(surrogate * mask).sum() / len(logprobs)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    gaps = (entropies - tau).abs().sort().values
    return entropies, mask, tau, float(loss), gradients, float(norm), float(gaps[1])


@pytest.fixture(scope="module")
def expected(model_folder):
    return reference_step(model_folder)


@pytest.mark.parametrize("case", CASES)
def test_one_step_matches_the_paper_at_every_layout(model_folder, expected, case):
    layout, budget = CASES[case]
    entropies, mask, tau, loss, gradients, norm, gap = expected
    # No other token is near the threshold, so the masks must agree without exception.
    assert gap > 2 * BOUNDARY_EPS["float32"]
    ranks = run_ranks(ParallelConfig(**layout).world_size, one_step, model_folder, layout, budget)
    holders = [r for r in ranks if r["selection"] is not None]

    seen = torch.zeros(len(entropies), dtype=torch.int64)
    for rank in holders:
        assert (rank["entropy"] - entropies[rank["rows"]]).abs().max() <= 1e-5
        assert torch.equal(rank["mask"], mask[rank["rows"]])
        assert abs(rank["selection"].threshold - tau) <= 1e-5
        assert rank["selection"].num_kept == int(mask.sum())
        assert rank["selection"].num_total == len(mask)
        assert rank["selection"].num_boundary == 0
        assert rank["unperturbed_offset"] == 0.0  # the ratio is exactly 1 after scoring
        assert abs(rank["metrics"]["loss"] - loss) <= 1e-6
        assert rank["metrics"]["masked_tokens"] == int(mask.sum())
        seen[rank["rows"]] += 1
    assert set(seen.tolist()) == {layout.get("tp", 1)}  # every token once on each tp rank
    if case == "tp1-small-packs":
        assert sum(r["empty_packs"] for r in holders) > 0

    for rank in ranks:
        assert abs(rank["metrics"]["grad_norm"] / norm - 1) <= 1e-5
    ours = {name: g for rank in ranks for name, g in rank["gradients"].items()}
    assert set(ours) == set(gradients)
    for name, g in gradients.items():
        error = (ours[name] - g).abs().max() / g.abs().max()
        assert error <= 1e-5, f"{name}: {error:.2e}"


def test_random_selection_is_the_same_at_every_layout(model_folder):
    chosen = []
    for layout in ({}, {"tp": 2}, {"dp": 2}):
        world = ParallelConfig(**layout).world_size
        ranks = run_ranks(world, one_step, model_folder, layout, 24, "random")
        chosen.append({int(row) for r in ranks for row in r["rows"][r["mask"]]})
    total = make_table().num_rows
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == -(-total // 5)


def decay_only(folder):
    """An update without gradients: every advantage is 0."""
    parallel = ParallelConfig()
    policy = Policy(
        ModelConfig(path=str(folder), dtype="float32"),
        parallel,
        initialize(parallel),
        training=TrainingConfig(steps=1, lr=0.1, weight_decay=0.5, warmup_steps=2),
        algorithm=AlgorithmConfig(),
        forking=ForkingConfig(),
        temperature=1.0,
    )
    before = dict(policy.export_shards())
    before = {name: value.clone() for name, value in before.items()}
    table = make_table().with_columns(advantage_B=torch.zeros(make_table().num_samples))
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    metrics = policy.update(table, scores, mask)
    assert metrics["grad_norm"] == 0.0
    return before, {name: value.clone() for name, value in policy.export_shards()}


def test_weight_decay_and_warm_up(model_folder):
    [(before, after)] = run_ranks(1, decay_only, model_folder)
    for name, value in before.items():
        # lr is 0.1 / 2 at the first of two warm-up steps; norms are not decayed
        factor = 1.0 if "norm" in name else 1 - 0.05 * 0.5
        assert torch.allclose(after[name], value * factor, rtol=1e-6), name

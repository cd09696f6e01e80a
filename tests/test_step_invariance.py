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
from megafork.errors import UserError
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
    "cp2": ({"cp": 2}, 32),
    "tp2-cp2": ({"tp": 2, "cp": 2}, 32),
    "tp2-sp-cp2": ({"tp": 2, "cp": 2, "sequence_parallel": True}, 32),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, 32),
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


def make_policy(folder, layout, *, dtype="float32", select="top", **training):
    parallel = ParallelConfig(**layout)
    settings = {"steps": 1, "micro_batch_tokens": 64, "warmup_steps": 0} | training
    return Policy(
        ModelConfig(path=str(folder), dtype=dtype),
        parallel,
        initialize(parallel),
        training=TrainingConfig(**settings),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        forking=ForkingConfig(rho=RHO, select=select),
        temperature=1.0,
    )


def one_step(folder, layout, budget, select="top"):
    policy = make_policy(folder, layout, select=select, micro_batch_tokens=budget, grad_clip=1e9)
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
        for name, value in export_weights(policy.stages, policy.topology, lambda p: p.main_grad)
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
    for bucket in (b for ddp in policy.ddp for buffer in ddp.buffers for b in buffer.buckets):
        shards = list(bucket.grad_data.chunk(group.size()))
        torch.distributed.all_gather(shards, shards[group.rank()].clone(), group=group)


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
    return entropies, mask, tau, float(loss.detach()), gradients, float(norm), float(gaps[1])


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
        # The head ran on the selected rows with an advantage and on no other.
        assert rank["metrics"]["head_rows"] == int((mask & (make_table().advantage_R != 0)).sum())
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
    policy = make_policy(folder, {}, lr=0.1, weight_decay=0.5, warmup_steps=2)
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


STEPS, CLIP, LR, DECAY = 3, 0.05, 1e-5, 0.1


def several_updates(folder, layout):
    """The same old log-probabilities for all updates: later ratios differ from 1."""
    policy = make_policy(folder, layout, lr=LR, weight_decay=DECAY, grad_clip=CLIP)
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    norms = [policy.update(table, scores, mask)["grad_norm"] for _ in range(STEPS)]
    return norms, {name: value.clone() for name, value in policy.export_shards()}


def reference_updates(folder):
    """torch.optim.AdamW and clip_grad_norm_ in float64."""
    model = reference.load_model(folder, torch.float64)
    table = make_table()
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "norm" not in n], "weight_decay": DECAY},
            {"params": [p for n, p in named.items() if "norm" in n], "weight_decay": 0.0},
        ],
        lr=LR,
    )
    old = mask = None
    norms = []
    for _ in range(STEPS):
        scored = []
        for b in range(table.num_samples):
            response = table.token_R[table.rows(b)].tolist()
            z = reference.response_logits(model, table.prompt(b).tolist(), response)
            scored.append(reference.logprobs_and_entropies(z, response))
        logprobs, entropies = (torch.cat(column) for column in zip(*scored, strict=True))
        if old is None:
            old = logprobs.detach()
            mask = entropies.detach() >= reference.top_threshold(entropies.detach(), RHO)
        ratio = (logprobs - old).exp()
        advantage = table.advantage_R.double()
        surrogate = torch.min(
            ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage
        )
        optimizer.zero_grad()
        (-(surrogate * mask).sum() / len(logprobs)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return norms, {n: p.detach() for n, p in named.items()}


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2}], ids=str
)
def test_clipped_updates_are_adamw(model_folder, layout):
    expected_norms, expected = reference_updates(model_folder)
    assert min(expected_norms) > CLIP  # every update is clipped
    ranks = run_ranks(ParallelConfig(**layout).world_size, several_updates, model_folder, layout)
    for norms, _ in ranks:
        assert norms == pytest.approx(expected_norms, rel=1e-4)
    ours = {name: value for _, weights in ranks for name, value in weights.items()}
    assert set(ours) == set(expected)
    for name, value in expected.items():
        # Three AdamW steps move a weight by up to 3 lr. A float32 weight of size 1 is stated to
        # 6e-8 = 0.006 lr; where a gradient is near Adam's epsilon its direction is rounding, so
        # single elements may be off by a fraction of a step.
        difference = (ours[name] - value).abs()
        assert difference.mean() <= 1e-2 * LR, name
        assert difference.max() <= 0.2 * LR, name


def score_in_bfloat16(folder, layout):
    policy = make_policy(folder, layout, dtype="bfloat16", micro_batch_tokens=40)
    table = make_table()
    scores = policy.score(table)
    [mask], selection = policy.select([table], [scores], step=1)
    metrics = policy.update(table, scores, mask)
    return scores.rows_N, scores.entropy_N, selection, metrics


def test_bfloat16_moves_entropies_within_the_stated_eps(tmp_path):
    folder = reference.save_model(tmp_path, tied=False, dtype=torch.bfloat16, seed=3)
    entropies = {}
    for layout in ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True}):
        column = torch.full((make_table().num_rows,), torch.nan)
        world = ParallelConfig(**layout).world_size
        for rows, entropy, selection, metrics in run_ranks(
            world, score_in_bfloat16, folder, layout
        ):
            column[rows] = entropy
            assert metrics["grad_norm"] > 0
            if selection is not None:
                assert metrics["max_ratio_offset"] == 0.0
                assert 0.2 <= selection.kept_fraction <= 0.22
        entropies[str(layout)] = column
    first, *others = entropies.values()
    moved = [float((first - other).abs().max()) for other in others]
    assert 0 < max(moved) <= BOUNDARY_EPS["bfloat16"]


def update_with_nan(folder, layout):
    policy = make_policy(folder, layout)
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    broken = replace(scores, old_logprobs_N=torch.full_like(scores.old_logprobs_N, -torch.inf))
    weights = list(policy.stages[0].gpt.parameters())
    before = [p.detach().clone() for p in weights]
    with pytest.raises(UserError, match="gradient norm of update 1 is"):
        policy.update(table, broken, mask)
    return all(
        torch.equal(a, b) for a, b in zip(before, policy.stages[0].gpt.parameters(), strict=True)
    )


def test_a_gradient_that_is_not_finite_changes_no_weight(model_folder):
    assert run_ranks(2, update_with_nan, model_folder, {"tp": 2}) == [True, True]

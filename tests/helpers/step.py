"""One optimizer step at any layout, and the same step in float64 from the paper's formulas.

The reference is plain transformers, one sequence at a time: a sort for the threshold, one sum over
selected tokens, one denominator.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megafork.algorithms import losses
from megafork.algorithms.advantages import group_advantages
from megafork.config import (
    ParallelConfig,
)
from megafork.data.token_table import token_table
from megafork.model.weights import export_weights
from megafork.parallel.mesh import initialize
from megafork.trainer.policy import Policy
from tests.helpers import reference
from tools.benchmarks.configs import learner_config
from tools.benchmarks.ranks import run_ranks

RHO, CLIP_LOW, CLIP_HIGH = 0.2, 0.2, 0.28
MAX_RESPONSE_TOKENS = 14  # responses have 1 to 11


def make_table(seed=5, num_groups=6):
    table = token_table(reference.make_groups(num_groups, 4, seed=seed))
    advantages = group_advantages(table.reward_B, table.group_B, normalize=True)
    return table.with_columns(advantage_R=advantages[table.sample_R])


def perturbation(rows):
    """Moves the old log-probabilities, so that ratios differ from 1 and some are clipped."""
    return 0.4 * torch.sin(rows.float() * 1.7)


def make_policy(
    folder,
    layout,
    *,
    dtype="float32",
    model=None,
    forking=None,
    algorithm=None,
    mismatch=None,
    kl=None,
    entropy_bonus=None,
    **training,
):
    config = learner_config(
        folder,
        parallel=layout,
        model={"dtype": dtype} | (model or {}),
        training={"micro_batch_tokens": 128, "warmup_steps": 0} | training,
        algorithm={"clip_low": CLIP_LOW, "clip_high": CLIP_HIGH} | (algorithm or {}),
        forking={"rho": RHO} | (forking or {}),
        mismatch=mismatch or {},
        kl=kl or {},
        entropy_bonus=entropy_bonus or {},
        rollout={"max_response_tokens": MAX_RESPONSE_TOKENS},
    )
    return Policy(config, initialize(config.parallel))


def one_step(folder, layout, settings, mutate=None):
    """On every rank: what it selected, its gradients by HF name, its metrics."""
    if mutate is not None:
        mutate()
    policy = make_policy(folder, layout, grad_clip=1e9, **settings)
    table = make_table()
    scores = policy.score(table)
    [mask], selection = policy.select([table], [scores], step=1)
    empty_packs = (
        sum(not part.any() for part in mask.split([len(p.rows_N) for p in scores.packs]))
        if policy.mesh.is_last_stage
        else 0
    )
    old = scores.old_logprobs_N + perturbation(scores.rows_N)
    shifted = replace(scores, old_logprobs_N=old)
    trained = see_logprobs()
    judged = policy.judged_update(table, shifted, mask)
    gradients = whole_gradients(policy)
    of_head = mask & (table.advantage_R[scores.rows_N] != 0)
    metrics = policy.apply(judged)
    return {
        "rows": scores.rows_N,
        "mask": mask,
        "entropy": scores.entropy_N,
        "selection": selection,
        "gradients": gradients,
        "metrics": metrics,
        "scored": scores.old_logprobs_N[of_head] if policy.mesh.is_last_stage else None,
        "trained": torch.cat(trained) if trained else torch.zeros(0),
        "empty_packs": empty_packs,
    }


def see_logprobs():
    """A list that will have the log-probabilities of each pack that the policy's loss is of."""
    seen, exact = [], losses.policy_loss

    def loss(logprobs_N, *args, **options):
        seen.append(logprobs_N.detach().cpu())
        return exact(logprobs_N, *args, **options)

    losses.policy_loss = loss
    return seen


def whole_gradients(policy):
    """By HF name. The distributed optimizer leaves each replica its shard: put them together."""
    group = policy.mesh.groups.dp_cp
    for bucket in (b for ddp in policy.ddp for buffer in ddp.buffers for b in buffer.buckets):
        shards = list(bucket.grad_data.chunk(group.size()))
        torch.distributed.all_gather(shards, shards[group.rank()].clone(), group=group)
    exported = export_weights(policy.stages, policy.mesh, lambda p: p.main_grad)
    return {name: value.clone() for name, value in exported}


def score_each(model, table):
    """Of every sample its (log-probabilities, entropies), differentiable."""
    scored = []
    for b in range(table.num_samples):
        response = table.token_R[table.rows(b)].tolist()
        z = reference.response_logits(model, table.prompt(b).tolist(), response)
        scored.append(reference.logprobs_and_entropies(z, response))
    return scored


def score_all(model, table):
    """(log-probabilities, entropies) of every row of the table, differentiable."""
    columns = zip(*score_each(model, table), strict=True)
    logprobs, entropies = map(torch.cat, columns)
    return logprobs, entropies.detach()


def paper_loss(logprobs, old_logprobs, table, mask):
    """Equation 5: the clipped surrogate of the selected tokens over all response tokens."""
    ratio = (logprobs - old_logprobs).exp()
    advantage = table.advantage_R.double()
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    return -(surrogate * mask).sum() / len(logprobs)


def reference_step(folder):
    model = reference.load_model(folder, torch.float64)
    table = make_table()
    logprobs, entropies = score_all(model, table)
    tau = reference.top_threshold(entropies, RHO)
    mask = entropies >= tau
    old = logprobs.detach() + perturbation(torch.arange(len(logprobs)))
    loss = paper_loss(logprobs, old, table, mask)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    gaps = (entropies - tau).abs().sort().values
    offsets = ((logprobs.detach() - old).exp() - 1).abs()
    return {
        "entropies": entropies,
        "mask": mask,
        "threshold": tau,
        "loss": float(loss.detach()),
        "gradients": gradients,
        "norm": float(norm),
        "gap": float(gaps[1]),
        "max_ratio_offset": float(offsets[mask & (table.advantage_R != 0)].max()),
    }


def assert_step(folder, expected, layout, settings, mutate=None):
    """Run the step on the layout's ranks and compare everything. Returns the ranks' outcomes."""
    parallel = ParallelConfig(**layout)
    ranks = run_ranks(parallel.world_size, one_step, folder, layout, settings, mutate)
    mask, entropies = expected["mask"], expected["entropies"]
    holders = [r for r in ranks if r["selection"] is not None]
    seen = torch.zeros(len(mask), dtype=torch.int64)
    for rank in holders:
        seen[rank["rows"]] += 1
        assert (rank["entropy"] - entropies[rank["rows"]]).abs().max() <= 1e-5
        assert torch.equal(rank["mask"], mask[rank["rows"]])
        selection = rank["selection"]
        assert abs(selection.threshold - expected["threshold"]) <= 1e-5
        assert (selection.num_kept, selection.num_total) == (int(mask.sum()), len(mask))
        assert selection.num_boundary == 0
        # Training computes the bits that scoring did: but for `perturbation` the ratio is 1.
        assert torch.equal(rank["trained"], rank["scored"])
        offset = rank["metrics"]["max_ratio_offset"]
        assert abs(offset - expected["max_ratio_offset"]) <= 1e-5
        assert abs(rank["metrics"]["loss"] - expected["loss"]) <= 1e-6
        # The head ran on the selected rows with an advantage and on no other.
        assert rank["metrics"]["head_rows"] == int((mask & (make_table().advantage_R != 0)).sum())
    assert set(seen.tolist()) == {parallel.tp}  # every token once on each tp rank
    for rank in ranks:
        assert abs(rank["metrics"]["grad_norm"] / expected["norm"] - 1) <= 1e-5
    ours = {name: g for rank in ranks for name, g in rank["gradients"].items()}
    assert set(ours) == set(expected["gradients"])
    for name, g in expected["gradients"].items():
        error = (ours[name] - g).abs().max() / g.abs().max()
        assert error <= 1e-5, f"{name}: {error:.2e}"
    return ranks

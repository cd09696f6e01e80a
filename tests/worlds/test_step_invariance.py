"""One optimizer step is the same at every layout, and is the paper's."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.trainer.clock import Clock
from megafork.trainer.policy import BOUNDARY_EPS
from megafork.trainer.step import optimize
from tests.helpers import reference
from tests.helpers.layouts import default_run, depth_for
from tests.helpers.step import (
    RHO,
    assert_step,
    make_policy,
    make_table,
    paper_loss,
    reference_step,
    score_all,
    whole_gradients,
)
from tools.benchmarks.ranks import run_ranks

SP = {"tp": 2, "sequence_parallel": True}
FULL, SELECTIVE = {"model": {"recompute": "full"}}, {"model": {"recompute": "selective"}}
# Layout, and settings: tokens of a micro-batch on one rank, activation recomputation.
CASES = {
    "tp1": ({}, {"micro_batch_tokens": 1000}),
    "tp1-small-packs": ({}, {"micro_batch_tokens": 18}),
    "tp1-full-recompute": ({}, FULL),
    "tp1-selective-recompute": ({}, SELECTIVE),
    "tp2": ({"tp": 2}, {}),
    "tp2-full-recompute": ({"tp": 2}, FULL),
    "tp2-sp": (SP, {}),
    "tp2-sp-selective-recompute": (SP, SELECTIVE),
    "pp2": ({"pp": 2}, {}),
    "pp2-uneven": ({"pp": 2, "pipeline_layers": [3, 1]}, {}),
    "pp4": ({"pp": 4}, {"micro_batch_tokens": 32}),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, {"micro_batch_tokens": 32}),
    "pp2-vpp2-dummy-packs": ({"pp": 2, "vpp": 2}, {"micro_batch_tokens": 1000}),
    "pp2-vpp2-full-recompute": ({"pp": 2, "vpp": 2}, FULL),
    "cp2": ({"cp": 2}, {"micro_batch_tokens": 32}),
    "cp4-small-packs": ({"cp": 4}, {"micro_batch_tokens": 6}),
    "dp2": ({"dp": 2}, {}),
    "dp2-small-packs": ({"dp": 2}, {"micro_batch_tokens": 18}),
    "dp4": ({"dp": 4}, {}),
    "tp2-pp2": ({"tp": 2, "pp": 2}, {}),
    "tp2-sp-pp2-vpp2": ({**SP, "pp": 2, "vpp": 2}, {}),
    "tp2-cp2": ({"tp": 2, "cp": 2}, {"micro_batch_tokens": 32}),
    "tp2-sp-cp2": ({**SP, "cp": 2}, {"micro_batch_tokens": 32}),
    "tp2-dp2": ({"tp": 2, "dp": 2}, {"micro_batch_tokens": 24}),
    "pp2-cp2-full-recompute": ({"pp": 2, "cp": 2}, FULL),
    "pp2-vpp2-dp2": ({"pp": 2, "vpp": 2, "dp": 2}, {}),
    "cp2-dp2": ({"cp": 2, "dp": 2}, {"micro_batch_tokens": 16}),
    "tp2-sp-pp2-vpp2-cp2": ({**SP, "pp": 2, "vpp": 2, "cp": 2}, {"micro_batch_tokens": 32}),
}


# A world of every size, each kind of parallelism and its commonest pairs, tied and untied in turn.
BY_DEFAULT = {
    *[(case, True) for case in (
        "tp1-small-packs", "tp2-full-recompute", "pp2-uneven", "cp2", "dp2-small-packs",
        "tp2-sp-pp2-vpp2-cp2",
    )],
    *[(case, False) for case in (
        "tp1-selective-recompute", "tp2-sp", "pp2-vpp2-dummy-packs", "tp2-sp-cp2", "tp2-dp2", "pp4",
    )],
}  # fmt: skip


@functools.cache
def expected_of(folder):
    return reference_step(folder)


@pytest.mark.parametrize(
    "case_and_tied",
    default_run([(case, tied) for case in CASES for tied in (True, False)], BY_DEFAULT),
    ids=lambda value: f"{value[0]}-{'tied' if value[1] else 'untied'}",
)
def test_one_step_matches_the_paper_at_every_layout(model_of, case_and_tied):
    case, tied = case_and_tied
    layout, settings = CASES[case]
    folder = model_of(tied, depth_for(layout))
    expected = expected_of(folder)
    # No other token is near the threshold, so the masks must agree without exception.
    assert expected["gap"] > 2 * BOUNDARY_EPS["float32"]
    ranks = assert_step(folder, expected, layout, settings)
    if case == "tp1-small-packs":
        assert sum(rank["empty_packs"] for rank in ranks) > 0


def choose(folder, layout, settings):
    """The rows that this rank has chosen; no update is made."""
    policy = make_policy(folder, layout, **settings)
    scores = policy.score(table := make_table())
    [mask], _ = policy.select([table], [scores], step=1)
    return scores.rows_N[mask].tolist()


def test_random_selection_is_the_same_at_every_layout(model_of):
    chosen = []
    settings = {"micro_batch_tokens": 24, "forking": {"select": "random"}}
    for layout in ({}, {"tp": 2}, {"dp": 2}, {"cp": 2}, {"pp": 2, "vpp": 2}):
        world = ParallelConfig(**layout).world_size
        ranks = run_ranks(world, choose, model_of(True, 4), layout, settings)
        chosen.append({row for rows in ranks for row in rows})
    assert all(rows == chosen[0] for rows in chosen)
    assert len(chosen[0]) == -(-make_table().num_rows // 5)


def score_and_select(folder, layout, forking):
    policy = make_policy(folder, layout, forking=forking)
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    order = scores.rows_N.argsort()
    return scores.old_logprobs_N[order], scores.entropy_N[order], mask[order]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=str)
def test_the_entropys_temperature_moves_the_selection_alone(model_of, layout):
    """The log-probabilities stay those of the sampling temperature, bit for bit."""
    folder = model_of(False)
    model, table = reference.load_model(folder, torch.float64), make_table()
    parts = []
    for b in range(table.num_samples):
        response = table.token_R[table.rows(b)].tolist()
        with torch.no_grad():
            z = reference.response_logits(model, table.prompt(b).tolist(), response)
        parts.append(reference.logprobs_and_entropies(z / 3.0, response)[1])
    expected = torch.cat(parts)
    world = ParallelConfig(**layout).world_size
    sampled, hot = (
        run_ranks(world, score_and_select, folder, layout, forking)[0]
        for forking in ({}, {"entropy_temperature": 3.0})
    )
    assert torch.equal(sampled[0], hot[0])
    assert (hot[1] - expected).abs().max() <= 1e-5
    assert torch.equal(hot[2], expected >= reference.top_threshold(expected, RHO))
    assert int((sampled[2] != hot[2]).sum()) >= 4


def select_with_filtered(folder, layout):
    forking = {"population": "response"}
    policy = make_policy(folder, layout, forking=forking, micro_batch_tokens=40)
    table = make_table()
    table = table.with_loss_mask(table.sample_R % 3 != 1)
    scores = policy.score(table)
    [mask], selection = policy.select([table], [scores], step=1)
    return scores.rows_N[mask].tolist(), selection


def test_filtered_responses_count_in_the_threshold_at_every_layout(model_of):
    folder = model_of(False)
    table = make_table()
    with torch.no_grad():
        _, entropies = score_all(reference.load_model(folder, torch.float64), table)
    tau = reference.top_threshold(entropies, RHO)
    assert ((entropies - tau).abs() <= 2e-5).sum() == 1
    in_loss = table.sample_R % 3 != 1
    top = entropies >= tau
    assert (top & ~in_loss).any()
    for layout in ({}, {"dp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}):
        ranks = run_ranks(ParallelConfig(**layout).world_size, select_with_filtered, folder, layout)
        chosen = {row for rows, _ in ranks for row in rows}
        assert chosen == set((top & in_loss).nonzero()[:, 0].tolist())
        for _, selection in ranks:
            if selection is not None:
                assert (selection.num_kept, selection.num_total) == (int(top.sum()), len(top))


# Updates between the mini-batches are large, so that "current" entropies differ from "old" ones,
# and smooth (a large epsilon), so that rounding stays rounding.
LARGE_STEPS = {"lr": 4e-3, "adam_eps": 1e-2, "weight_decay": 0.0, "grad_clip": 1e9}
SCOPES = [
    {"scope": scope, "entropy_of": entropy_of}
    for scope in ("minibatch", "sequence", "batch")
    for entropy_of in ("old", "current")
    if (scope, entropy_of) != ("batch", "current")
]


def two_minibatches():
    """With models of both depths no token but one is near a threshold in any of the scopes."""
    return make_table(seed=26, num_groups=4).minibatches(2, seed=0)


def both_updates(folder, layout, settings, forking):
    policy = make_policy(folder, layout, forking=forking, **settings, **LARGE_STEPS)
    minibatches = two_minibatches()
    done = optimize(policy, minibatches, step=1, clock=Clock())
    found = [
        (scores.rows_N, scores.entropy_N, mask)
        for scores, mask in zip(done.scores, done.masks, strict=True)
    ]
    return found, done.selections, done.updates, whole_gradients(policy)


def reference_minibatches(folder, forking):
    """Two updates with torch's AdamW: what each selected, its loss and its gradients."""
    model = reference.load_model(folder, torch.float64)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LARGE_STEPS["lr"], eps=LARGE_STEPS["adam_eps"], weight_decay=0.0
    )
    tables = two_minibatches()
    with torch.no_grad():
        scored = [score_all(model, table) for table in tables]
    of_batch = reference.top_threshold(torch.cat([entropies for _, entropies in scored]), RHO)
    steps = []
    for table, (old_logprobs, old_entropies) in zip(tables, scored, strict=True):
        logprobs, now = score_all(model, table)
        entropies = now if forking["entropy_of"] == "current" else old_entropies
        parts = [entropies]
        if forking["scope"] == "sequence":
            parts = entropies.split(table.response_lengths_B.tolist())
        taus = [
            of_batch if forking["scope"] == "batch" else reference.top_threshold(part, RHO)
            for part in parts
        ]
        for part, tau in zip(parts, taus, strict=True):
            # Responses of a group share their first entropy: a tie at the threshold would be
            # decided by rounding.
            assert ((part - tau).abs() < 1e-3).sum() <= 1
        mask = torch.cat([part >= tau for part, tau in zip(parts, taus, strict=True)])
        optimizer.zero_grad()
        loss = paper_loss(logprobs, old_logprobs, table, mask)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        steps.append(
            {
                "entropies": entropies,
                "mask": mask,
                "threshold": sum(taus) / len(taus),
                "loss": float(loss.detach()),
                "gradients": gradients,
                "norm": float(torch.stack([g.norm() for g in gradients.values()]).norm()),
            }
        )
    return steps


@functools.cache
def expected_minibatches(folder, scope, entropy_of):
    return reference_minibatches(folder, {"scope": scope, "entropy_of": entropy_of})


@pytest.mark.parametrize("forking", SCOPES, ids=lambda f: f"{f['scope']}-{f['entropy_of']}")
@pytest.mark.parametrize(
    "case",
    default_run(
        ["tp1-small-packs", "tp2-sp-cp2", "pp2-vpp2-full-recompute", "cp2-dp2"],
        ["tp1-small-packs", "tp2-sp-cp2"],
    ),
)
def test_scopes_and_both_entropies_at_every_layout(model_of, forking, case):
    layout, settings = CASES[case]
    folder = model_of(False, depth_for(layout))
    steps = expected_minibatches(folder, **forking)
    world = ParallelConfig(**layout).world_size
    gradients = {}
    for found, selections, updates, of_rank in run_ranks(
        world, both_updates, folder, layout, settings, forking
    ):
        gradients |= of_rank
        for update, step in zip(updates, steps, strict=True):
            assert update["grad_norm"] == pytest.approx(step["norm"], rel=1e-4)
        if not selections:
            continue
        for update, (rows, entropies, mask), step in zip(updates, found, steps, strict=True):
            assert update["loss"] == pytest.approx(step["loss"], abs=1e-5)
            assert (entropies - step["entropies"][rows]).abs().max() <= 5e-5
            assert torch.equal(mask, step["mask"][rows])
        # One threshold for the whole batch, or one selection for each mini-batch.
        for selection, step in zip(selections, steps, strict=forking["scope"] != "batch"):
            assert selection.threshold == pytest.approx(step["threshold"], abs=5e-5)
        kept = sum(int(step["mask"].sum()) for step in steps)
        assert sum(selection.num_kept for selection in selections) == kept
    # Of the last update: the one before it has carried its rounding along.
    for name, expected in steps[-1]["gradients"].items():
        error = (gradients[name] - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, f"{name}: {error:.2e}"


def test_current_entropies_are_other_ones(model_of):
    """Else the test above could not tell them apart."""
    old, current = (
        expected_minibatches(model_of(False), "minibatch", which) for which in ("old", "current")
    )
    assert torch.equal(old[0]["entropies"], current[0]["entropies"])
    assert (old[1]["entropies"] - current[1]["entropies"]).abs().max() > 0.05
    assert not torch.equal(old[1]["mask"], current[1]["mask"])


TIES = [(ties, scope) for ties in ("keep", "hash") for scope in ("minibatch", "sequence")]


def select_among_ties(folder, layout):
    """By each of TIES. Entropies are cut to a few values: many tokens are tied with a threshold."""
    policy = make_policy(folder, layout, micro_batch_tokens=24)
    table = make_table()
    scores = policy.score(table)
    cut = replace(scores, entropy_N=(scores.entropy_N * 1.5).round() / 1.5)
    found = {}
    for ties, scope in TIES:
        policy.forking = policy.forking.model_copy(update={"ties": ties, "scope": scope})
        [mask], selection = policy.select([table], [cut], step=1)
        found[ties, scope] = scores.rows_N[mask].tolist(), selection
    return found


@pytest.fixture(scope="module")
def ranks_with_ties(model_of):
    """What the ranks of each of four layouts have selected."""
    layouts = ({}, {"tp": 2, "sequence_parallel": True}, {"cp": 2, "dp": 2}, {"pp": 2})
    folder = model_of(False)
    return [
        run_ranks(ParallelConfig(**layout).world_size, select_among_ties, folder, layout)
        for layout in layouts
    ]


@pytest.mark.parametrize("case", TIES, ids="-".join)
def test_ties_are_settled_the_same_way_at_every_layout(ranks_with_ties, case):
    chosen = []
    for ranks in ranks_with_ties:
        chosen.append({row for rank in ranks for row in rank[case][0]})
        for _, selection in (rank[case] for rank in ranks):
            if selection is not None:
                assert selection.num_kept == len(chosen[-1])
                assert (selection.num_kept > selection.num_wanted) == (case[0] == "keep")
    assert all(rows == chosen[0] for rows in chosen)

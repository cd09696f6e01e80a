"""An update that would spoil the weights is not made: all ranks agree, and nothing else changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from megafork.algorithms.advantages import group_advantages
from megafork.config import ParallelConfig, TrainingConfig
from megafork.data.token_table import token_table
from megafork.trainer.clock import Clock
from megafork.trainer.step import optimize
from megafork.trainer.update_guard import UpdateGuard, UpdateRefused
from tests.helpers import reference
from tests.helpers.step import make_policy, make_table
from tests.helpers.trained import adams
from tools.benchmarks.ranks import run_ranks

LAYOUTS = [
    {},
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2},
    {"dp": 2},
    {"tp": 2, "pp": 2},
]


@pytest.fixture(scope="module")
def model_folder(model_of):
    return model_of(False)


def weights_of(policy):
    return {name: value.clone() for name, value in policy.export_shards()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def good_update(policy):
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    return policy.update(table, scores, mask)["grad_norm"]


def refused_between_two(folder, layout, value):
    """Weights after two updates, with one between them that a single rank spoils."""
    policy = make_policy(folder, layout, lr=1e-3)
    good_update(policy)
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    if policy.mesh.rank == policy.mesh.last_stage_rank:
        old = scores.old_logprobs_N.clone()
        old[mask & (table.advantage_R[scores.rows_N] < 0)] = value  # at > 0 they would be clipped
        scores = replace(scores, old_logprobs_N=old)
    before = weights_of(policy)
    with pytest.raises(UpdateRefused) as refusal:
        policy.update(table, scores, mask)
    assert policy.num_updates == 1
    assert equal(before, weights_of(policy))
    norm = good_update(policy)
    return str(refusal.value), norm, weights_of(policy)


def two_updates(folder, layout):
    policy = make_policy(folder, layout, lr=1e-3)
    good_update(policy)
    return good_update(policy), weights_of(policy)


@pytest.mark.parametrize(
    ("layout", "value"),
    [*((layout, -torch.inf) for layout in LAYOUTS), ({"pp": 2}, torch.nan)],
    ids=str,
)
def test_one_spoilt_rank_and_no_rank_updates(model_folder, layout, value):
    world = ParallelConfig(**layout).world_size
    spoilt = run_ranks(world, refused_between_two, model_folder, layout, value)
    untouched = run_ranks(world, two_updates, model_folder, layout)
    assert len({reason for reason, _, _ in spoilt}) == 1
    assert spoilt[0][0] in ("its loss is nan", "its loss is inf", "its gradient norm is nan")
    for (_, norm, weights), (expected_norm, expected) in zip(spoilt, untouched, strict=True):
        assert norm == expected_norm
        assert equal(weights, expected)


def a_spike(folder, layout, factor):
    policy = make_policy(folder, layout, spike_factor=factor, grad_clip=1e-9)
    norm = good_update(policy)
    for _ in range(64):  # as if the last updates had been a thousand times smaller
        policy.guard.made(1e3, norm / 1000)
    before = weights_of(policy)
    try:
        good_update(policy)
    except UpdateRefused as refusal:
        return str(refusal), equal(before, weights_of(policy))
    return None, equal(before, weights_of(policy))


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_a_spike_is_refused_by_all(model_folder, layout):
    world = ParallelConfig(**layout).world_size
    for reason, unchanged in run_ranks(world, a_spike, model_folder, layout, 10.0):
        assert "gradient norm" in reason and "training.spike_factor=10 times" in reason
        assert unchanged
    outcomes = run_ranks(world, a_spike, model_folder, layout, None)
    assert {reason for reason, _ in outcomes} == {None}
    assert not all(unchanged for _, unchanged in outcomes)


def test_norms_that_were_small_without_a_reward_refuse_no_reward():
    """As of a KL alone, or of a critic that has nothing left to learn."""
    guard = UpdateGuard(TrainingConfig(steps=1))
    for _ in range(64):
        guard.made(0.0, 1e-3)
    assert guard.fault(0.1, 2.0) is None
    assert "gradient norm of 11 is more" in guard.fault(0.1, 11.0)


def make_guard(**settings):
    return UpdateGuard(TrainingConfig(steps=1, **settings))


def test_the_guard_needs_experience_and_forgets():
    guard = make_guard(spike_factor=5.0)
    for _ in range(15):
        guard.made(0.1, 1.0)
    assert guard.fault(100.0, 100.0) is None
    guard.made(0.0, 0.0)  # no advantage: it teaches nothing
    assert guard.fault(100.0, 100.0) is None
    guard.made(-2.0, 2.0)
    assert guard.fault(9.9, 9.9) is None  # five times 2.0 and 2.0
    assert "its loss of 10.1 is more" in guard.fault(-10.1, 1.0)
    assert "its gradient norm of 10.1 is more" in guard.fault(0.1, 10.1)
    for _ in range(64):
        guard.made(0.001, 1.0)
    assert guard.fault(4.9, 1.0) is None  # a loss is compared with 1 at least
    assert "its loss" in guard.fault(5.1, 1.0)
    assert "gradient norm" in guard.fault(0.1, 5.1)


def test_updates_without_an_advantage_do_not_lock_the_guard():
    guard = make_guard()
    for _ in range(100):
        guard.made(0.0, 0.0)
    assert guard.fault(0.01, 0.3) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_guard_refuses_what_is_not_finite_from_the_start(bad):
    assert make_guard().fault(bad, 1.0) == f"its loss is {abs(bad)}"
    assert make_guard().fault(0.1, bad) == f"its gradient norm is {bad}"


def test_the_guard_goes_on_where_its_checkpoint_was():
    guard = make_guard(spike_factor=2.0)
    for i in range(30):
        guard.made(0.1 * i, 1.0 / (1 + i))
    guard.skipped()
    guard.skipped()
    other = make_guard(spike_factor=2.0)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    assert other.num_skipped_in_a_row == 2
    other.made(0.1, 0.1)
    assert other.num_skipped_in_a_row == 0


def make_minibatches(bad_group=None):
    groups = reference.make_groups(6, 4, seed=5)
    if bad_group is not None:
        samples = list(groups[bad_group].samples)
        samples[1] = replace(samples[1], reward=math.nan)
        groups[bad_group] = replace(groups[bad_group], samples=samples)
    table = token_table(groups)
    advantages = group_advantages(table.reward_B, table.group_B, normalize=True)
    return table.with_columns(advantage_R=advantages[table.sample_R]).minibatches(2, seed=1)


def train_on(folder, layout, bad_group, leave_out, scope):
    policy = make_policy(folder, layout, lr=1e-3, forking={"scope": scope})
    minibatches = make_minibatches(bad_group)
    if leave_out:
        group = make_table().group_B.unique()[bad_group]
        minibatches = [m for m in minibatches if group not in m.group_B]
    done = optimize(policy, minibatches, step=1, clock=Clock())
    skipped = [(part.number, part.reason) for part in done.skipped]
    return skipped, len(done.updates), weights_of(policy), policy.guard.num_skipped_in_a_row


@pytest.mark.parametrize("scope", ["minibatch", "batch"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_a_bad_reward_costs_its_minibatch_alone(model_folder, layout, scope):
    """The other updates are those of a rollout batch without the bad mini-batch."""
    world = ParallelConfig(**layout).world_size
    bad = run_ranks(world, train_on, model_folder, layout, 3, False, scope)
    without = run_ranks(world, train_on, model_folder, layout, 3, True, scope)
    for (skipped, updates, weights, in_a_row), (nothing, expected_updates, expected, _) in zip(
        bad, without, strict=True
    ):
        [(_, reason)] = skipped
        assert reason.startswith("a reward of response ") and reason.endswith(" is nan")
        assert nothing == []
        assert updates == expected_updates == 2
        assert in_a_row == 0  # updates came after it
        assert equal(weights, expected)


def poisoned_embedding(folder, layout, entropy_of):
    """NaN in the embedding of a token that one mini-batch alone has."""
    policy = make_policy(folder, layout, forking={"entropy_of": entropy_of})
    minibatches = make_minibatches()
    tokens = [set(m.token_R.tolist()) | set(m.prompt_ids_P.tolist()) for m in minibatches]
    index, token = next(
        (i, min(own))
        for i in range(len(tokens))
        if (own := tokens[i] - set().union(*(t for j, t in enumerate(tokens) if j != i)))
    )
    for stage in policy.stages:
        for rule, parameter in stage.parameters():
            if "embedding" in rule.megatron:
                rows = len(parameter)
                local = token - policy.mesh.tp_rank * rows
                if 0 <= local < rows:
                    parameter.data[local] = torch.nan
    done = optimize(policy, minibatches, step=1, clock=Clock())
    return index, [(s.number, s.reason) for s in done.skipped], len(done.updates)


@pytest.mark.parametrize("entropy_of", ["old", "current"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_a_nan_in_the_forward_pass_costs_its_minibatch_alone(model_folder, layout, entropy_of):
    world = ParallelConfig(**layout).world_size
    for index, skipped, updates in run_ranks(
        world, poisoned_embedding, model_folder, layout, entropy_of
    ):
        reason = "a log-probability or an entropy of the policy is not finite"
        assert skipped == [(index, reason)]
        assert updates == 2


def all_cut(table):
    """As overlong filtering leaves a mini-batch whose every response was cut."""
    return table.with_loss_mask(torch.zeros_like(table.loss_mask_R))


def adam_of(policy):
    return [t.clone() for state in adams(policy) for s in state.state.values() for t in s.values()]


def an_empty_update(folder, layout):
    """Where Adam has momentum: what moves, and how many updates are counted."""
    policy = make_policy(folder, layout, lr=1e-3, weight_decay=0.1)
    good_update(policy)
    before, adam = weights_of(policy), adam_of(policy)
    table = all_cut(make_table())
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    metrics = policy.update(table, scores, mask)
    moved = [
        not equal(before, weights_of(policy)),
        not all(torch.equal(*pair) for pair in zip(adam, adam_of(policy), strict=True)),
    ]
    return moved, policy.num_updates, metrics["grad_norm"]


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_a_minibatch_whose_every_response_was_cut_moves_nothing(model_folder, layout):
    world = ParallelConfig(**layout).world_size
    for moved, num_updates, norm in run_ranks(world, an_empty_update, model_folder, layout):
        assert moved == [False, False]
        assert (num_updates, norm) == (1, 0.0)


def train_around(folder, layout, scope, with_empty):
    policy = make_policy(folder, layout, lr=1e-3, forking={"scope": scope})
    first, second, third = make_minibatches()
    parts = [all_cut(first), second, all_cut(third), third] if with_empty else [second, third]
    done = optimize(policy, parts, step=1, clock=Clock())
    return done.num_empty, len(done.updates), done.skipped, len(done.tables), weights_of(policy)


@pytest.mark.parametrize(("scope", "layout"), [("minibatch", {}), ("batch", {"dp": 2})], ids=str)
def test_a_cut_minibatch_is_counted_and_changes_no_other(model_folder, scope, layout):
    world = ParallelConfig(**layout).world_size
    ranks, without = (
        run_ranks(world, train_around, model_folder, layout, scope, with_empty)
        for with_empty in (True, False)
    )
    for (empty, *rest, weights), (none, *expected_rest, expected) in zip(
        ranks, without, strict=True
    ):
        assert (empty, none) == (2, 0)
        assert rest == expected_rest == [2, [], 2]
        assert equal(weights, expected)


def test_a_batch_that_was_cut_as_a_whole_has_no_update(model_folder):
    [(empty, updates, unchanged)] = run_ranks(1, train_on_nothing, model_folder)
    assert (empty, updates, unchanged) == (3, 0, True)


def train_on_nothing(folder):
    policy = make_policy(folder, {}, lr=1e-3)
    good_update(policy)
    before = weights_of(policy)
    parts = [all_cut(part) for part in make_minibatches()]
    done = optimize(policy, parts, step=1, clock=Clock())
    return done.num_empty, len(done.updates), equal(before, weights_of(policy))

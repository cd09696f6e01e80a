"""What has a test of its own elsewhere, all at once: three mini-batches at other layouts.

Critic, KL, entropy bonus, comparison with a reference, a correction, a mini-batch with a NaN: the
same weights, metrics and skips as on one process.
"""

from __future__ import annotations

import math

import pytest
import torch

from megafork.algorithms.advantages import group_advantages
from megafork.config import ParallelConfig
from megafork.model.weights import export_weights
from megafork.trainer.clock import Clock
from megafork.trainer.entropy_record import entropy_record
from megafork.trainer.step import optimize
from megafork.trainer.step_record import critic_metrics, update_metrics
from tests.helpers import reference
from tests.helpers.ppo import make_critic, make_ppo_table, save_critic
from tests.helpers.reference import near
from tests.helpers.step import make_policy
from tools.benchmarks.ranks import run_ranks

pytestmark = pytest.mark.slow

SMOOTH = {"lr": 4e-3, "adam_eps": 1e-2, "weight_decay": 0.0, "grad_clip": 1e9}
"""Adam with a large epsilon: an update is about linear in the gradient, as are its errors."""
GSPO = {"objective": "gspo", "clip_low": 0.04, "clip_high": 0.06, "denominator": "sequence_tokens"}
CISPO = {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3, "old_logprobs": "engine"}
KL = {"coefficient": 0.3, "estimator": "k3", "ratio": True}
CRITIC = {"gae_lambda": 0.95, "gamma": 0.98, "clip_value": 0.05, "tokens": "forking"}

COMBINATIONS = {
    "ppo": {
        "critic": CRITIC,
        "kl": KL,
        "entropy_bonus": {"coefficient": 0.2, "tokens": "all"},
        "forking": {"population": "response", "entropy_of": "current", "compare_every": 2},
    },
    "gspo": {
        "critic": CRITIC,
        "kl": KL | {"estimator": "k1", "tokens": "forking"},
        "entropy_bonus": {"coefficient": 0.2},
        "algorithm": GSPO,
        "mismatch": {"correction": "mask", "level": "sequence", "max_weight": 3.0},
        "forking": {"population": "response", "scope": "batch", "compare_every": 1},
    },
    "cispo": {
        "critic": CRITIC | {"tokens": "all"},
        "kl": KL,
        "algorithm": CISPO,
        "forking": {"scope": "sequence", "entropy_of": "current", "compare_every": 1},
    },
    "a reward that is no number": {
        "kl": KL,
        "algorithm": {"clip_dual": 1.5},
        "forking": {"select": "bottom", "entropy_of": "current", "ties": "hash"},
        "spoilt": 3,
    },
}
LAYOUTS = [
    ({"tp": 2, "sequence_parallel": True}, {}),
    ({"pp": 2}, {}),
    ({"cp": 2}, {"micro_batch_tokens": 32}),
    ({"dp": 2}, {"micro_batch_tokens": 18}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the policy, the critic and a reference near the policy."""
    root = tmp_path_factory.mktemp("models")
    policy = reference.save_model(root / "policy", tied=False, seed=3)
    return policy, save_critic(root / "critic", tied=False), near(policy, root / "reference")


def batch(policy, with_critic, spoilt):
    """Mini-batches whose engine is not quite the policy; `spoilt`: a response with a NaN reward."""
    table = make_ppo_table(seed=15)
    scores = policy.score(table)
    own = torch.zeros(table.num_rows)
    if policy.mesh.is_last_stage and policy.mesh.tp_rank == 0:
        own[scores.rows_N] = scores.old_logprobs_N
    torch.distributed.all_reduce(own)
    engines = own + 0.3 * torch.sin(torch.arange(table.num_rows).float() * 1.3)
    table = table.with_columns(rollout_logprob_R=engines)
    if not with_critic:
        advantages = group_advantages(table.reward_B, table.group_B, normalize=True)
        table = table.with_columns(advantage_R=advantages[table.sample_R])
    if spoilt is not None:
        rewards = table.reward_B.clone()
        rewards[spoilt] = torch.nan
        table = table.with_columns(reward_B=rewards)
    return [part for part in table.minibatches(2, seed=0) if part.num_loss_tokens]


def exported(model):
    return {n: w.clone() for n, w in export_weights(model.stages, model.mesh, torch.clone)}


def three_minibatches(folders, layout, combination, settings):
    """On every rank: metrics, weights of policy and critic, skips, the report of tokens."""
    options = dict(combination)
    of_critic, spoilt = options.pop("critic", None), options.pop("spoilt", None)
    options["kl"] = options["kl"] | {"reference": str(folders[2])}
    policy = make_policy(folders[0], layout, **options, **settings, **SMOOTH)
    critic = None
    if of_critic is not None:
        own = {"lr": 4e-3, "weight_decay": 0.0} | of_critic
        critic = make_critic(folders[1], layout, policy.mesh, adam_eps=1e-2, critic=own, **settings)
    minibatches = batch(policy, critic is not None, spoilt)
    done = optimize(policy, minibatches, step=2, clock=Clock(), critic=critic)
    record = entropy_record(policy, done, policy_version=1, step=2)
    metrics = {}
    if policy.mesh.is_last_stage:
        metrics = record.metrics | update_metrics(done.updates, policy.terms)
        if critic is not None:
            metrics |= critic_metrics(done.values, done.critic_updates)
    weights = exported(policy)
    if critic is not None:
        weights |= {f"critic.{name}": weight for name, weight in exported(critic).items()}
    return metrics, weights, [(s.number, s.reason) for s in done.skipped], record.forking_tokens


@pytest.mark.parametrize("name", COMBINATIONS)
def test_everything_at_once_is_the_same_at_every_layout(folders, name):
    combination = COMBINATIONS[name]
    [(metrics, weights, skips, report)] = run_ranks(
        1, three_minibatches, folders, {}, combination, {}
    )
    assert len(skips) == ("spoilt" in combination)
    assert metrics["grad_norm"] > 0 and metrics["loss/kl"] > 0
    for layout, settings in LAYOUTS:
        world = ParallelConfig(**layout).world_size
        ranks = run_ranks(world, three_minibatches, folders, layout, combination, settings)
        ours = {n: w for _, part, _, _ in ranks for n, w in part.items()}
        assert set(ours) == set(weights)
        for n, weight in weights.items():
            assert (ours[n] - weight).abs().max() <= 2e-5, (layout, n)
        for own, _, own_skips, own_report in ranks:
            assert own_skips == skips
            assert own_report["selected"] == report["selected"]
            assert not own or set(own) == set(metrics)
            for key, value in own.items():
                same = math.isclose(value, metrics[key], rel_tol=1e-4, abs_tol=1e-5)
                assert same or math.isnan(value) == math.isnan(metrics[key]) == 1, (layout, key)

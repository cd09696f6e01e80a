"""A critic's weights, its value head and its Adam go with the run's checkpoints, at any layout."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megafork.checkpoint.store import CheckpointStore
from megafork.config import CheckpointConfig, ParallelConfig
from megafork.errors import UserError
from megafork.model.weights import export_weights
from megafork.trainer.clock import Clock
from megafork.trainer.step import optimize
from tests.helpers import reference
from tests.helpers.commands import lines, megafork, tiny_run
from tests.helpers.ppo import make_critic, make_ppo_table, save_critic
from tests.helpers.replays import comparable, resume
from tests.helpers.step import make_policy
from tests.helpers.trained import everything, without_padding
from tools.benchmarks.ranks import run_ranks

TP2, PP2 = {"tp": 2}, {"pp": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return (
        reference.save_model(folder / "policy", tied=True, seed=3),
        save_critic(folder / "critic", tied=True),
    )


def both(folders, layout):
    policy = make_policy(folders[0], layout, lr=1e-3)
    return policy, make_critic(folders[1], layout, policy.mesh, critic={"lr": 1e-3})


def learn(policy, critic):
    """Two updates of each."""
    minibatches = make_ppo_table().minibatches(3, seed=0)
    return optimize(policy, minibatches, step=1, clock=Clock(), critic=critic)


def losses(done):
    """Of both; None before the last stage."""
    updates = [*done.updates, *done.critic_updates]
    return [update["loss"] for update in updates] if "loss" in updates[0] else None


def weights(critic):
    return {n: w.clone() for n, w in export_weights(critic.stages, critic.mesh, torch.clone)}


def save(store, policy, critic, step):
    state = {"step": step} | ({"critic": critic.state()} if critic is not None else {})
    store.save(step, policy.stages, policy.optimizer, state, critic)
    store.finish()


def store_at(folder, policy):
    return CheckpointStore(folder, policy.mesh, CheckpointConfig())


def learn_and_save(folders, layout, target):
    policy, critic = both(folders, layout)
    learn(policy, critic)
    save(store_at(target, policy), policy, critic, 2)
    return weights(critic), losses(learn(policy, critic))


def load_and_save(folders, layout, source, target):
    policy, critic = both(folders, layout)
    store = store_at(source, policy)
    state = store.load(store.newest(), policy.stages, policy.optimizer, critic)
    critic.restore(state["critic"])
    policy.num_updates = critic.num_updates
    loaded = weights(critic)
    save(store_at(target, policy), policy, critic, 2)
    return loaded, losses(learn(policy, critic))


def joined(ranks):
    return {name: w for own, _ in ranks for name, w in own.items()}


def test_a_checkpoint_of_tp2_at_pp2_and_on_one_process(folders, tmp_path):
    """Every tensor with its bits: both models, the value head, Adam's of both. They go on alike."""
    ranks = run_ranks(2, learn_and_save, folders, TP2, tmp_path / "tp2")
    saved, later = joined(ranks), next(own for _, own in ranks if own)
    [original] = run_ranks(1, everything, tmp_path / "tp2" / "step_000002")
    of_critic = {n for n in original if n.startswith("critic.")}
    assert {f"critic.{n}" for n in original if not n.startswith("critic.")} <= of_critic | {
        "critic.output_layer.weight"
    }
    head = "critic.optimizer.state.{}.output_layer.{}"
    assert {head.format(k, p) for k in ("exp_avg", "param") for p in ("weight", "bias")} < of_critic
    assert torch.equal(original["critic.output_layer.weight"], saved["score.weight"])
    assert not torch.equal(
        saved["score.weight"], load_file(folders[1] / "model.safetensors")["score.weight"]
    )  # it has learnt
    for name, layout in (("pp2", PP2), ("one", {})):
        world = ParallelConfig(**layout).world_size
        theirs = run_ranks(world, load_and_save, folders, layout, tmp_path / "tp2", tmp_path / name)
        loaded = joined(theirs)
        assert set(loaded) == set(saved)
        assert all(torch.equal(saved[n], loaded[n]) for n in saved)
        assert next(own for _, own in theirs if own) == pytest.approx(later, abs=1e-5)
        [again] = run_ranks(1, everything, tmp_path / name / "step_000002")
        assert set(again) == set(original)
        for key, tensor in original.items():
            pair = without_padding(key, tensor), without_padding(key, again[key])
            assert torch.equal(*pair), f"{name}: {key}"


def save_without(folders, target):
    policy, _ = both(folders, {})
    save(store_at(target, policy), policy, None, 1)


def load_without(folders, source):
    policy, critic = both(folders, {})
    store = store_at(source, policy)
    with pytest.raises(UserError, match=r"holds no critic: algorithm\.advantages=gae begins with"):
        store.load(store.newest(), policy.stages, policy.optimizer, critic)


def test_a_checkpoint_without_a_critic_says_so(folders, tmp_path):
    run_ranks(1, save_without, folders, tmp_path)
    run_ranks(1, load_without, folders, tmp_path)


METRICS = {
    "loss/value",
    "value/mean",
    "value/explained_variance",
    "value/clip_fraction",
    "advantage/mean",
    "advantage/std",
    "critic/grad_norm",
    "critic/lr",
    "time/value",
}
PPO = (
    "algorithm.advantages=gae",
    "critic.lr=1e-3",
    "critic.clip_value=0.2",
    "critic.tokens=forking",
    "training.steps=3",
    "checkpoint.every=2",
    "parallel.tp=2",
    "eval.prompts=8",
    "sync.check_prompts=2",
)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_with_a_critic_trains_and_goes_on_bit_for_bit(tmp_path):
    """Resumed after step 2 it ends as it did, from its journal; the policy alone converts."""
    run_dir = tmp_path / "run"
    done = megafork(*tiny_run(run_dir, *PPO), mark=run_dir)
    assert done.returncode == 0, done.stderr
    rows = lines(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= METRICS
        assert row["loss/value"] > 0 and row["critic/grad_norm"] > 0
        assert -math.inf < row["value/explained_variance"] <= 1
    assert rows[0]["value/mean"] == 0.0 and rows[1]["value/mean"] != 0.0
    assert rows[0]["ratio/first_update_max_offset"] == 0.0
    whole = comparable(run_dir)

    checkpoint = run_dir / "checkpoints" / "step_000002"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["critic"]["num_updates"] == state["policy"]["num_updates"] == 4
    shutil.rmtree(run_dir / "checkpoints" / "step_000003")
    shutil.rmtree(run_dir / "checkpoints" / "final")
    resume(run_dir)
    assert comparable(run_dir) == whole
    hf = tmp_path / "hf"
    done = megafork("convert", "megatron-to-hf", "--megatron", checkpoint, "--hf", hf)
    assert done.returncode == 0, done.stderr
    assert not any("critic" in n or "score" in n for n in load_file(hf / "model.safetensors"))

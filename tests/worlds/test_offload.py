"""A policy that was put away and came back is the one it was, to the bit, and left no memory."""

from __future__ import annotations

import gc

import pytest
import torch

from megafork.config import ParallelConfig
from megafork.parallel.host_memory import HostMemory, storages
from megafork.trainer.critic import estimate_advantages
from tests.helpers import reference
from tests.helpers.ppo import make_critic, make_ppo_table, save_critic
from tests.helpers.step import make_policy, make_table, whole_gradients
from tests.helpers.trained import own_tensors, store_of
from tools.benchmarks.ranks import run_ranks

LAYOUTS = {
    "tp2": ({"tp": 2}, "float32"),
    "dp2": ({"dp": 2}, "float32"),
    "dp2-bfloat16": ({"dp": 2}, "bfloat16"),
    "pp2-vpp2-tied": ({"pp": 2, "vpp": 2}, "bfloat16"),
}
LEARNING = {"lr": 1e-3, "weight_decay": 0.1}


def live_storages():
    """Of all tensors that this process holds, whoever has them."""
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return storages((t for t in tensors if t.layout == torch.strided), torch.device("cpu"))


def live_bytes(homes, foreign):
    """Without what is put away, and what this process had from the test's."""
    known = {slab.data_ptr() for home in homes for slab in home.slabs} | foreign
    return sum(s.nbytes() for address, s in live_storages().items() if address not in known)


def homes(learner):
    return learner._weights_home, learner._optimizer_home


def update(policy, offloads):
    """One update; with `offloads`, away and back wherever a run may do so."""

    def turn():
        if offloads:
            policy.offload()
            policy.onload()

    table = make_table()
    turn()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    turn()
    metrics = policy.update(table, scores, mask)
    turn()
    return metrics


def trained(folder, layout, dtype, offloads):
    policy = make_policy(folder, layout, dtype=dtype, **LEARNING)
    metrics = [update(policy, offloads) for _ in range(3)]
    views = {name: t.untyped_storage()._cdata for name, t in own_tensors(policy).items()}
    if offloads:
        policy.offload()
        policy.offload()  # what is away stays away
        policy.onload(optimizer=False)
        policy.offload()
        policy.onload()
        policy.onload()
        now = {name: t.untyped_storage()._cdata for name, t in own_tensors(policy).items()}
        assert now == views
        assert not any(buffer.grad_data.any() for ddp in policy.ddp for buffer in ddp.buffers)
    tensors = {name: t.clone() for name, t in own_tensors(policy).items()}
    table = make_table()
    scores = policy.score(table)
    policy.accumulate_gradients(table, scores, table.loss_mask_R[scores.rows_N])
    return metrics, tensors, whole_gradients(policy)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_goes_on_as_if_nothing_had_been_put_away(tmp_path, name):
    layout, dtype = LAYOUTS[name]
    folder = reference.save_model(tmp_path, tied="tied" in name, seed=3, dtype=torch.float32)
    world = ParallelConfig(**layout).world_size
    whole, away = (run_ranks(world, trained, folder, layout, dtype, o) for o in (False, True))
    for (metrics, tensors, gradients), (metrics_2, tensors_2, gradients_2) in zip(
        whole, away, strict=True
    ):
        assert metrics == metrics_2
        assert any("exp_avg_sq" in name for name in tensors)
        for ours, theirs in ((tensors, tensors_2), (gradients, gradients_2)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def bytes_held(folder, critic_folder, layout, dtype):
    foreign = set(live_storages())
    policy = make_policy(folder, layout, dtype=dtype, **LEARNING)
    critic = make_critic(critic_folder, layout, policy.mesh, dtype=dtype, **LEARNING)
    update(policy, False)
    table = make_ppo_table()
    scores = policy.score(table)
    done = estimate_advantages(critic, [table], [scores])
    mask = done.tables[0].loss_mask_R[scores.rows_N]
    critic.apply(critic.judged_update(done.tables[0], done.scores[0], mask))
    del done, scores, table, mask
    before = live_bytes((), foreign)
    kept = [*homes(policy), *homes(critic)]
    for learner in (policy, critic):
        learner.offload(weights=False)
    weights_alone = live_bytes(kept, foreign)
    for learner in (policy, critic):
        learner.offload()
    away = live_bytes(kept, foreign)
    for learner in (policy, critic):
        learner.onload()
    own = storages(
        (
            p.data
            for learner in (policy, critic)
            for s in learner.stages
            for p in s.gpt.parameters()
        ),
        torch.device("cpu"),
    )
    weights = sum(s.nbytes() for s in own.values())
    return before, weights_alone, away, live_bytes(kept, foreign), weights


@pytest.mark.parametrize("name", ["tp2", "dp2-bfloat16"])
def test_nothing_is_left_on_the_device(tmp_path, name):
    layout, dtype = LAYOUTS[name]
    folder = reference.save_model(tmp_path / "model", tied=False)
    critic = save_critic(tmp_path / "critic", tied=False)
    for before, weights_alone, away, after, weights in run_ranks(
        2, bytes_held, folder, critic, layout, dtype
    ):
        assert after == before
        assert away < 0.01 * before  # masks, tables of angles
        assert weights_alone == away + weights < 0.5 * before


def misuse(folder):
    policy = make_policy(folder, {}, **LEARNING)
    table = make_table()
    scores = policy.score(table)
    [mask], _ = policy.select([table], [scores], step=1)
    store = store_of(policy, folder / "run")
    told = []
    policy.offload(weights=False)
    policy.score(table)
    assert len(dict(policy.export_shards())) == len(policy.shard_manifest())
    for what in (
        lambda: policy.update(table, scores, mask),
        lambda: store.save(1, policy.stages, policy.optimizer, {"step": 1}),
    ):
        with pytest.raises(AssertionError) as caught:
            what()
        told.append(str(caught.value))
    policy.offload()
    for what in (
        lambda: policy.score(table),
        lambda: policy.export_shards(),
        lambda: policy.update(table, scores, mask),
        lambda: store.save(1, policy.stages, policy.optimizer, {"step": 1}),
    ):
        with pytest.raises(AssertionError) as caught:
            what()
        told.append(str(caught.value))
    return told


def test_what_is_away_cannot_be_used(tmp_path):
    folder = reference.save_model(tmp_path, tied=False)
    [told] = run_ranks(1, misuse, folder)
    assert all(text.endswith("onload() comes first") for text in told), told


def test_host_memory_of_several_slabs(monkeypatch):
    """Storages that end within a slab, span several, and are views; one that is empty."""
    monkeypatch.setattr("megafork.parallel.host_memory._SLAB", 100)
    tensors = [torch.randn(n) for n in (7, 60, 0, 25)] + [torch.randn(30).bfloat16()]
    tensors.append(tensors[1][3:9])
    expected = [t.clone() for t in tensors]
    home = HostMemory(torch.device("cpu"))
    for _ in range(2):
        lot = storages(tensors, torch.device("cpu"))
        assert len(lot) == 4
        home.put_away(lot.values())
        assert sum(t.untyped_storage().nbytes() for t in tensors) == 0
        home.bring_back()
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))
    assert [len(slab) for slab in home.slabs] == [100, 100, 100, 100, 28]

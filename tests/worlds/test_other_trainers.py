"""examples/own_trainer's hooks for verl and slime, called with what these packages hand over.

Neither package is installed: verl's modules are stood in for by the two names that the hook takes
from them, and slime only calls functions.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from examples.own_trainer import slime_loss
from tests.helpers.reference import top_threshold
from tools.benchmarks.ranks import run_ranks

VOCAB, TEMPERATURE, LENGTHS = 24, 0.7, [(9, 5), (14, 11), (6, 1)]  # of all, of the response


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.fixture
def verl(monkeypatch):
    """verl 0.9's trainer, registry and queue, as far as the hook reaches."""
    queue, registry, updated = {}, {}, []

    class Rows(dict):
        def select(self, *fields):
            return {field: self[field] for field in fields}

    class PPOTrainerSync:
        def _update_actor(self, batch, metrics):
            updated.append(batch)
            return batch

    def register_trainer(name):
        return lambda trainer: registry.setdefault(name, trainer)

    def kv_batch_get(keys, partition_id, select_fields):
        return Rows({field: queue[field].clone() for field in select_fields})

    def kv_batch_put(keys, partition_id, fields):
        queue.update(fields)
        return SimpleNamespace(keys=keys, partition_id=partition_id)

    modules = {
        "verl.trainer.ppo.v1": {
            "PPOTrainerSync": PPOTrainerSync,
            "register_trainer": register_trainer,
        },
        "transfer_queue": {"kv_batch_get": kv_batch_get, "kv_batch_put": kv_batch_put},
        **{name: {} for name in ("verl", "verl.trainer", "verl.trainer.ppo")},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    name = "examples.own_trainer.verl_trainer"
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)
    yield SimpleNamespace(queue=queue, trainer=registry["forking"](), updated=updated)
    del sys.modules[name]


def test_verls_advantages_are_zero_outside_the_mask(verl):
    draw = torch.Generator().manual_seed(0)
    lengths = [7, 3, 12, 9]
    entropies, advantages = ([torch.randn(n, generator=draw) for n in lengths] for _ in range(2))
    masks = [torch.ones(n, dtype=torch.int64) for n in lengths]
    masks[2][4:8] = 0  # a tool's answer
    verl.queue |= {
        "entropy": nested(entropies),
        "advantages": nested(advantages),
        "response_mask": nested(masks),
    }
    metrics = {}
    batch = SimpleNamespace(keys=list("abcd"), partition_id="train")
    verl.trainer._update_actor(batch, metrics)
    entropy, advantage, mask = map(torch.cat, (entropies, advantages, masks))
    kept = mask.bool() & (entropy >= top_threshold(entropy[mask.bool()], 0.2))
    assert torch.equal(verl.queue["advantages"].values(), torch.where(kept, advantage, 0.0))
    assert metrics["actor/forking_fraction"] == pytest.approx(int(kept.sum()) / int(mask.sum()))
    assert len(verl.updated) == 1 and verl.updated[0].keys == batch.keys


def micro_batch():
    """A micro-batch as slime's loss gets it, padded to 32 tokens, and its whole logits."""
    draw = torch.Generator().manual_seed(1)
    response = [length for _, length in LENGTHS]

    def of_responses():
        return [torch.randn(n, generator=draw) for n in response]

    masks = [torch.ones(n, dtype=torch.int32) for n in response]
    masks[1][3:6] = 0
    batch = {
        "tokens": torch.randint(VOCAB, (1, 32), generator=draw),
        "total_lengths": [length for length, _ in LENGTHS],
        "response_lengths": response,
        "loss_masks": masks,
        "advantages": of_responses(),
        "log_probs": [values - 3 for values in of_responses()],
    }
    return batch, 2 * torch.randn(1, 32, VOCAB, generator=draw)


def with_megatron(tensor_parallel, function, *args):
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel)
    try:
        return function(*args)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


ARGS = SimpleNamespace(rollout_temperature=TEMPERATURE, eps_clip=0.2, eps_clip_high=0.28)


def shard_of_the_loss():
    batch, logits = micro_batch()
    shard = logits.chunk(2, -1)[dist.get_rank()].clone().requires_grad_()
    loss, metrics = slime_loss.policy_loss(ARGS, batch, shard, None)
    loss.backward()
    return float(loss), shard.grad, float(metrics["entropy"])


def test_slimes_loss_on_two_vocabulary_shards_against_float64():
    batch, logits = micro_batch()
    logits = logits.double().requires_grad_()
    loss, entropy, begin = 0.0, 0.0, 0
    for i, (total, length) in enumerate(LENGTHS):
        first, begin = begin + total - length, begin + total
        logprobs = (logits[0, first - 1 : begin - 1] / TEMPERATURE).log_softmax(-1)
        mask, advantages = batch["loss_masks"][i], batch["advantages"][i].double()
        chosen = logprobs.gather(-1, batch["tokens"][0, first:begin, None])[:, 0]
        ratio = (chosen - batch["log_probs"][i].double()).exp()
        terms = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
        loss = loss - (terms * mask).sum()
        entropy -= float(((logprobs.exp() * logprobs).sum(-1) * mask).sum().detach())
    loss.backward()
    shards = run_ranks(2, with_megatron, 2, shard_of_the_loss)
    for found, _, of_entropy in shards:
        assert found == pytest.approx(loss.item(), rel=1e-5)
        assert of_entropy == pytest.approx(entropy, rel=1e-5)
    gradient = torch.cat([shard for _, shard, _ in shards], -1)
    assert torch.allclose(gradient.double(), logits.grad, rtol=1e-4, atol=1e-6)


def rollout():
    """The responses of two data-parallel ranks, of different lengths."""
    draw = torch.Generator().manual_seed(2)
    lengths = [[5, 8], [20, 1, 3]]
    columns = ("entropy", "advantages")
    ranks = []
    for of_rank in lengths:
        data = {name: [torch.rand(n, generator=draw) for n in of_rank] for name in columns}
        data["loss_masks"] = [(torch.rand(n, generator=draw) < 0.8).int() for n in of_rank]
        ranks.append(data | {"response_lengths": of_rank})
    return ranks


def selected():
    data = rollout()[dist.get_rank()]
    slime_loss.select(ARGS, 0, data)
    return data["advantages"]


def test_slimes_advantages_are_zero_outside_the_mask_of_all_ranks():
    found = run_ranks(2, with_megatron, 1, selected)
    ranks = rollout()
    entropy, advantages, masks = (
        torch.cat([torch.cat(data[name]) for data in ranks])
        for name in ("entropy", "advantages", "loss_masks")
    )
    kept = masks.bool() & (entropy >= top_threshold(entropy[masks.bool()], 0.2))
    assert [[len(part) for part in parts] for parts in found] == [[5, 8], [20, 1, 3]]
    assert torch.equal(torch.cat([torch.cat(parts) for parts in found]), advantages * kept)

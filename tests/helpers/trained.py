"""A policy that has learned a little, and what a checkpoint of it has to bring back."""

from __future__ import annotations

import torch
from megatron.core import dist_checkpointing

from megafork.checkpoint.store import CheckpointStore
from megafork.config import CheckpointConfig, ParallelConfig
from megafork.parallel.mesh import initialize
from tests.helpers import reference
from tests.helpers.step import make_policy, make_table

LAYOUTS = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "dp4": {"dp": 4},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "pp2-vpp2": {"pp": 2, "vpp": 2},
    "tp2-cp2": {"tp": 2, "cp": 2},
}


def make_trained(folder, layout, updates=0, dtype="float32"):
    policy = make_policy(
        folder, layout, dtype=dtype, lr=1e-4, weight_decay=0.1, forking={"select": "all"}
    )
    update(policy, updates)
    return policy


def update(policy, count):
    """`count` updates on one table, each with its own scores."""
    norms = []
    for _ in range(count):
        table = make_table()
        scores = policy.score(table)
        [mask], _ = policy.select([table], [scores], step=1)
        norms.append(policy.update(table, scores, mask)["grad_norm"])
    return norms


def store_of(policy, folder, *, model=None, **config):
    return CheckpointStore(folder, policy.mesh, CheckpointConfig(**config), model=model)


def save(policy, store, step, state=None):
    store.save(step, policy.stages, policy.optimizer, state or {"step": step})


def load(policy, store):
    return store.load(store.newest(), policy.stages, policy.optimizer)


def weights(policy):
    return {name: weight.clone() for name, weight in policy.export_shards()}


def adams(policy):
    optimizer = policy.optimizer
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def own_tensors(policy):
    """All that this rank holds: its weights, its main parameters, Adam's moments and steps."""
    tensors = {
        f"{index}.{name}": parameter
        for index, stage in enumerate(policy.stages)
        for name, parameter in stage.gpt.named_parameters()
    }
    for number, adam in enumerate(adams(policy)):
        main = [parameter for group in adam.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(main):
            tensors[f"adam{number}.{index}.main"] = parameter
            for kind, tensor in adam.state[parameter].items():
                tensors[f"adam{number}.{index}.{kind}"] = tensor
    return {name: tensor.detach() for name, tensor in tensors.items()}


def everything(folder):
    """Every tensor of a checkpoint by its global name: weights, main parameters, Adam's moments."""
    initialize(ParallelConfig())
    tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def without_padding(name, tensor):
    """A layout pads the vocabulary as its tp needs it, with zeros."""
    if not name.endswith(("word_embeddings.weight", "output_layer.weight")):
        return tensor
    assert not tensor[reference.VOCAB :].any(), name
    return tensor[: reference.VOCAB]

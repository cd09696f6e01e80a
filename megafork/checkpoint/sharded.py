"""Sharded checkpoints in megatron-core's dist_checkpointing format: any layout loads any other's.

Weights are stored under their global names and shapes, the distributed optimizer's state beside
them ("fully_reshardable"). Everything else that a run needs to go on is a JSON object.
"""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megafork.checkpoint.files import torch_save_raises_os_error
from megafork.checkpoint.writer import renew_results
from megafork.errors import UserError
from megafork.model.weights import Stage
from megafork.parallel.topology import Topology
from megafork.parallel.unpickling import guarded_checkpoint

# It warns of an "old incomplete / corrupted checkpoint" where our own files are there before it.
logging.getLogger(dist_checkpointing.serialization.__name__).setLevel(logging.ERROR)


class Saved(Protocol):
    """What a second model shows of itself to be saved."""

    stages: list[Stage]

    @property
    def optimizer(self) -> MegatronOptimizer: ...


def contents(
    stages: Sequence[Stage],
    optimizer: MegatronOptimizer | None,
    topology: Topology,
    critic: Saved | None = None,
    *,
    loading: bool = False,
) -> dict[str, Any]:
    """The policy's state and, under names that begin with "critic.", the critic's."""
    sharded = state_dict(stages, optimizer, topology, loading=loading)
    if critic is not None:
        own = state_dict(critic.stages, critic.optimizer, topology, loading=loading)
        add_prefix_for_sharding(own, "critic.")
        sharded["critic"] = own
    return sharded


def state_dict(
    stages: Sequence[Stage],
    optimizer: MegatronOptimizer | None,
    topology: Topology,
    *,
    loading: bool = False,
) -> dict[str, Any]:
    """What dist_checkpointing saves or fills: weights by stage, and the optimizer's state."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": topology.groups.dp_cp,
    }
    sharded: dict[str, Any] = {
        f"model{index}": stage.gpt.sharded_state_dict(metadata=metadata)
        for index, stage in enumerate(stages)
    }
    if optimizer is not None:
        _make_adam_state(optimizer)
        weights = {f"model{i}": sharded[f"model{i}"] for i in range(len(stages))}
        sharded["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata=metadata
        )
    return sharded


def save(folder: Path, contents: dict[str, Any], topology: Topology) -> AsyncRequest:
    """Begin to write; the request, which writes and then finishes, is the caller's to run.

    Replicas share the writing of what they hold alike. Raises OSError on rank 0, which writes what
    is no tensor at once, when it cannot.
    """
    strategy = FullyParallelSaveStrategyWrapper(
        dist_checkpointing.serialization.get_default_save_sharded_strategy(),
        topology.groups.dp_cp,
    )
    options: dict[str, Any] = {"sharded_strategy": strategy, "async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # later versions default to a package of its own
    renew_results()
    with torch_save_raises_os_error():
        request = dist_checkpointing.save(contents, str(folder), **options)
    assert request is not None
    return request


def load(
    folder: Path,
    stages: Sequence[Stage],
    optimizer: MegatronOptimizer | None,
    topology: Topology,
    critic: Saved | None = None,
) -> None:
    """Fill weights and optimizer state from `folder`, whatever layout wrote it. Collective.

    Raises UserError for what is damaged, or holds code.
    """
    strategy = FullyParallelLoadStrategyWrapper(
        dist_checkpointing.serialization.get_default_load_sharded_strategy(str(folder)),
        topology.groups.dp_cp,
    )
    wanted = contents(stages, optimizer, topology, critic, loading=True)
    try:
        with guarded_checkpoint():
            loaded = dist_checkpointing.load(wanted, str(folder), sharded_strategy=strategy)
    except (pickle.UnpicklingError, CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        told = str(causes[0]).partition("\n")[0]
        raise UserError(f"the checkpoint {folder} cannot be read ({told}): copy it again") from None
    _fill(stages, optimizer, loaded)
    if critic is not None:
        _fill(critic.stages, critic.optimizer, loaded["critic"])


def _fill(
    stages: Sequence[Stage], optimizer: MegatronOptimizer | None, loaded: dict[str, Any]
) -> None:
    for index, stage in enumerate(stages):
        stage.gpt.load_state_dict(loaded[f"model{index}"])
    if optimizer is not None:
        _without_step(optimizer)
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_steps(optimizer)


def _adams(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def _make_adam_state(optimizer: MegatronOptimizer) -> None:
    """torch's Adam makes its state in its first step; megatron asks for it before."""
    for distributed in _adams(optimizer):
        adam = distributed.optimizer
        if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter].update(
                        step=torch.tensor(0.0),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )


def _without_step(optimizer: MegatronOptimizer) -> None:
    """megatron copies every tensor of a parameter's state, and has no `step` to copy."""
    for distributed in _adams(optimizer):
        distributed._set_main_param_and_optimizer_states = partial(_copy_state, distributed)


def _copy_state(
    distributed: DistributedOptimizer, model_param: Tensor, tensors: dict[str, Tensor]
) -> None:
    group, index = distributed.model_param_group_index_map[model_param]
    main = distributed.optimizer.param_groups[group]["params"][index]
    state = distributed.optimizer.state[main]
    own = {"step": state["step"]} if "step" in state else {}
    DistributedOptimizer._set_main_param_and_optimizer_states(
        distributed, model_param, own | tensors
    )


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """megatron gives all parameters one `step` tensor: each update would count for all of them."""
    for distributed in _adams(optimizer):
        for state in distributed.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

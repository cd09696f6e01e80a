"""The distributed optimizer's state by parameter, as megatron stores it ("fully_reshardable").

For one save megatron copies a rank's whole state and gathers that of all replicas on every one of
them: 24 and more bytes a parameter. Here a replica gives what it holds, as it lies there. Only a
parameter that is cut between replicas is put together, on the one that holds most of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_TENSORS = ("param", "exp_avg", "exp_avg_sq")
Range = tuple[int, int]
"""First and last + 1 of a parameter's elements, flat"""


def prepare(optimizer: MegatronOptimizer) -> None:
    """Make Adam's state and put our method in place of megatron's, before megatron asks for it."""
    _make_adam_state(optimizer)
    for distributed in _adams(optimizer):
        distributed.sharded_param_state_fully_reshardable = partial(_sharded_state, distributed)


def fill(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what was loaded for the state dict that was made after `prepare`."""
    _without_step(optimizer)
    optimizer.load_state_dict(loaded)
    _separate_steps(optimizer)


def _adams(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def _make_adam_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that torch's Adam makes in its first step: megatron asks for it before."""
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
    state = distributed._get_main_param_and_optimizer_states(model_param)
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


def _sharded_state(
    optimizer: DistributedOptimizer,
    model_state: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[int, dict[str, ShardedTensor | ShardedTensorFactory]]:
    """Return {parameter's number: its tensors}; it takes the place of megatron's method.

    Loading, a single replica's state is filled where it lies; several use megatron's method.
    """
    replicas = optimizer.data_parallel_group
    if is_loading and replicas.size() > 1:
        return DistributedOptimizer.sharded_param_state_fully_reshardable(
            optimizer, model_state, is_loading, metadata
        )
    weights, _ = extract_sharded_tensors_and_factories(model_state)
    as_stored = {weight.data: weight for weight in nested_values(weights)}
    ranges: list[dict[int, Range]] = [{} for _ in range(replicas.size())]
    parameters = [p for buffer in optimizer.buffers for p in buffer.param_index_map]
    dist.all_gather_object(ranges, _held_here(optimizer, parameters), group=replicas)
    found = {}
    for number, parameter in enumerate(parameters):
        held = {rank: own[number] for rank, own in enumerate(ranges) if number in own}
        if replicas.rank() not in held:
            continue
        keeper = _most_of(held)
        state = optimizer._get_main_param_and_optimizer_states(parameter)
        whole = {
            name: _put_together(state[name].detach(), held, keeper, parameter.numel(), replicas)
            for name in _TENSORS
        }
        if replicas.rank() == keeper:
            stored = as_stored[parameter]
            found[number] = {name: _like(stored, name, flat) for name, flat in whole.items()}
    return found


def _held_here(optimizer: DistributedOptimizer, parameters: list[Tensor]) -> dict[int, Range]:
    """{parameter's number: what of it this replica's optimizer has}"""
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    return {
        numbers[parameter]: (ranges["param"].start, ranges["param"].end)
        for of_buffer in optimizer.gbuf_ranges
        for of_buckets in of_buffer.values()
        for bucket in of_buckets
        for parameter, ranges in bucket["param_map"].items()
    }


def _most_of(held: dict[int, Range]) -> int:
    """The first of the replicas that hold most of a parameter."""
    return max(held, key=lambda rank: (held[rank][1] - held[rank][0], -rank))


def _put_together(
    piece: Tensor, held: dict[int, Range], keeper: int, numel: int, replicas: dist.ProcessGroup
) -> Tensor:
    """Return the whole flat tensor on the keeper, made of the pieces that the others send it."""
    here = replicas.rank()
    if len(held) == 1:
        return piece
    if here != keeper:
        dist.send(piece, dist.get_global_rank(replicas, keeper), group=replicas)
        return piece
    whole = piece.new_empty(numel)
    for rank, (start, end) in held.items():
        if rank == here:
            whole[start:end] = piece
        else:
            dist.recv(whole[start:end], dist.get_global_rank(replicas, rank), group=replicas)
    return whole


def _like(
    stored: ShardedTensor | ShardedTensorFactory, name: str, flat: Tensor
) -> ShardedTensor | ShardedTensorFactory:
    """The same part of the same global tensor as the weight. Other replicas have none of it."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{stored.key}",
        "data": flat.view(stored.data.shape),
        "replica_id": (*stored.replica_id[:-1], 0),
    }
    if isinstance(stored, ShardedTensor):
        changes["dtype"] = flat.dtype
    return replace(stored, **changes)

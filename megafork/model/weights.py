"""Moves weights between HF names and this rank's GPTModel, by the rules of hf_mapping.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.errors import UserError
from megafork.model.hf_folder import SafetensorsFolder
from megafork.model.hf_mapping import Replicated, Rule, rules
from megafork.model.qwen3 import padded_vocab_size
from megafork.model.shape import ModelShape
from megafork.parallel import backend
from megafork.parallel.topology import Topology


def stage_rules(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, topology: Topology
) -> list[Rule]:
    """The rules of this rank's pipeline stage."""
    return list(
        rules(
            shape,
            layers=shape.stage_layers(parallel)[topology.pp_rank],
            first_stage=topology.is_first_stage,
            last_stage=topology.is_last_stage,
            padded_vocab_size=padded_vocab_size(shape, model, parallel),
            transformer_engine=backend.has_transformer_engine(),
        )
    )


def mark_tensor_parallel(gpt: GPTModel, table: list[Rule]) -> None:
    """Say of each parameter whether its tp ranks hold slices or copies, and along which dim.

    megatron does so only when it also initialises the weights at random, which we skip; without
    the marks its gradient norm would count the slices of tp rank 0 alone.
    """
    parameters = dict(gpt.named_parameters())
    for rule in table:
        dim = rule.sharding.dim
        if dim is not None and not hasattr(parameters[rule.megatron], "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameters[rule.megatron], True, dim, stride=1)


@torch.no_grad()
def load_weights(
    gpt: GPTModel, folder: SafetensorsFolder, table: list[Rule], topology: Topology
) -> None:
    """Fill every parameter of this stage from its slices. Raises UserError for a wrong shape."""
    parameters = dict(gpt.named_parameters())
    for rule in table:
        for name, expected in zip(rule.hf, rule.hf_shapes, strict=True):
            if name in folder.names and folder.shape(name) != expected:
                raise UserError(
                    f"{folder.folder}: {name} has shape {list(folder.shape(name))}, but its "
                    f"config.json asks for {list(expected)}"
                )
        shard = rule.sharding.read(folder.slice, rule.hf, topology.tp_rank, topology.tp_size)
        parameters.pop(rule.megatron).copy_(shard)
    assert not parameters, f"parameters without a rule: {sorted(parameters)}"


def export_weights(
    gpt: GPTModel,
    table: list[Rule],
    topology: Topology,
    value_of: Callable[[Tensor], Tensor] = lambda parameter: parameter.detach(),
) -> Iterator[tuple[str, Tensor]]:
    """This stage's tensors by HF name, one rule at a time, on the stage's tp rank 0.

    All tensor-parallel ranks of a stage must iterate together; the others get nothing. `value_of`
    picks what to export of a parameter (its weight; a test exports gradients).
    """
    parameters = dict(gpt.named_parameters())
    for rule in table:
        if not rule.exported:
            continue
        value = value_of(parameters[rule.megatron])
        shards = _gather(value, topology, whole=isinstance(rule.sharding, Replicated))
        if topology.tp_rank == 0:
            yield from zip(rule.hf, rule.sharding.merge(shards), strict=True)


def _gather(value: Tensor, topology: Topology, *, whole: bool) -> list[Tensor]:
    if whole or topology.tp_size == 1:
        return [value]
    group = topology.groups.tp
    shards = (
        [torch.empty_like(value) for _ in range(topology.tp_size)]
        if topology.tp_rank == 0
        else None
    )
    dist.gather(value.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards or []

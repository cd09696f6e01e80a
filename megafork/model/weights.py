"""Moves weights between HF names and this rank's GPTModel, by the rules of hf_mapping.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.model.gpt import Head, build_chunks
from megafork.model.hf_folder import SafetensorsFolder
from megafork.model.hf_mapping import Rule, rules
from megafork.model.shape import ModelShape, padded_vocab_size
from megafork.parallel import backend
from megafork.parallel.mesh import Mesh


@dataclass(frozen=True)
class Stage:
    """A pipeline stage of this rank (there are vpp), with the rules that name its parameters."""

    gpt: GPTModel
    rules: list[Rule]

    def parameters(self) -> Iterator[tuple[Rule, torch.nn.Parameter]]:
        """Every parameter with its rule, in the rules' order."""
        by_name = dict(self.gpt.named_parameters())
        assert len(by_name) == len(self.rules), "parameters without a rule"
        for rule in self.rules:
            yield rule, by_name[rule.megatron]


def build_stages(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    head: Head = "vocabulary",
) -> list[Stage]:
    """This rank's pipeline stages, on its device, parameters not yet loaded."""
    layers, last = shape.stage_layers(parallel), parallel.num_stages - 1
    stages = []
    for chunk, gpt in enumerate(build_chunks(shape, model, parallel, mesh, head)):
        index = chunk * mesh.pp_size + mesh.pp_rank
        table = rules(
            shape,
            layers=layers[index],
            first_stage=index == 0,
            last_stage=index == last,
            padded_vocab_size=padded_vocab_size(shape, model, parallel),
            transformer_engine=backend.has_transformer_engine(),
            value_head=head == "value",
        )
        stages.append(Stage(gpt, list(table)))
    return stages


def mark_tensor_parallel(stages: Sequence[Stage]) -> None:
    """Say of each parameter whether its tp ranks hold slices or copies, and along which dim.

    megatron does so only when it also initialises the weights at random, which we skip; without
    the marks its gradient norm would count the slices of tp rank 0 alone.
    """
    for rule, parameter in _parameters(stages):
        dim = rule.sharding.dim
        if dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, dim, stride=1)


@torch.no_grad()
def load_weights(stages: Sequence[Stage], folder: SafetensorsFolder, mesh: Mesh) -> None:
    """Fill every parameter of this rank from its slices. Raises UserError for a wrong shape."""
    for parameter, shard in read_weights(stages, folder, mesh):
        parameter.copy_(shard)


def read_weights(
    stages: Sequence[Stage], folder: SafetensorsFolder, mesh: Mesh
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Every parameter of this rank with its slice of the folder, in the folder's dtype.

    One whose rule says that a folder may lack it is left out where the folder does. Raises
    UserError for a wrong shape.
    """
    for rule, parameter in _parameters(stages):
        if rule.optional and not folder.names.issuperset(rule.hf):
            continue
        for name, expected in zip(rule.hf, rule.hf_shapes, strict=True):
            folder.check_holds(name)
            folder.check_shape(name, expected)
        yield (
            parameter,
            rule.sharding.read(folder.slice, rule.hf, mesh.tp_rank, mesh.tp_size),
        )


def export_weights(
    stages: Sequence[Stage],
    mesh: Mesh,
    value_of: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """This rank's tensors by HF name, on tp rank 0, which holds one of them at a time.

    All tensor-parallel ranks must iterate together; the others get nothing. Each takes its own
    shard apart, so that slices of one HF tensor are gathered and no fused matrix. `value_of` picks
    what to export of a parameter (its weight, its gradient).
    """
    for rule, parameter in _parameters(stages):
        if not rule.exported:
            continue
        parts = rule.sharding.parts(value_of(parameter), mesh.tp_size)
        for name, shape, part in zip(rule.hf, rule.hf_shapes, parts, strict=True):
            whole = _gather(part, rule.sharding.dim, mesh)
            if whole is not None:
                yield name, whole[: shape[0]]  # without the vocabulary's padding


def _parameters(stages: Sequence[Stage]) -> Iterator[tuple[Rule, torch.nn.Parameter]]:
    for stage in stages:
        yield from stage.parameters()


def _gather(part: Tensor, dim: int | None, mesh: Mesh) -> Tensor | None:
    """The whole tensor on tp rank 0."""
    size, group = mesh.tp_size, mesh.groups.tp
    if dim is None or size == 1:
        return part if mesh.tp_rank == 0 else None
    target = dist.get_global_rank(group, 0)
    if mesh.tp_rank:
        dist.gather(part.contiguous(), None, dst=target, group=group)
        return None
    # Rows arrive in their place; columns need one more copy.
    whole = part.new_empty(size * part.shape[0], *part.shape[1:])
    shards = list(whole.chunk(size))
    dist.gather(part.contiguous(), shards, dst=target, group=group)
    return whole if dim == 0 else torch.cat(shards, dim)

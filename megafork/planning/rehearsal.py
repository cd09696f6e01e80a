"""One rank's model, built for real on the meta device, and one micro-batch run through it there.

The shapes and lifetimes of all tensors are those of the real thing; no byte of them exists. A
rehearsal takes a world for itself (of torch's "fake" backend, whose collectives do nothing), so it
runs in a process that has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.model.gpt import head_weight
from megafork.model.layers import PackedAttention
from megafork.model.shape import ModelShape
from megafork.model.weights import Stage, build_stages
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from megafork.parallel import cpu_patch
from megafork.parallel.topology import Topology, initialize, shutdown
from megafork.planning.live import LiveBytes

META = torch.device("meta")


@dataclass(frozen=True)
class StageMemory:
    """What one rank of a pipeline stage holds, in bytes."""

    num_parameters: int
    """on this rank"""
    weights: int
    held_activations: int
    """of one micro-batch between its forward and its backward"""
    passing_activations: int
    """of one micro-batch at its peak, what is held included"""


@contextmanager
def world(parallel: ParallelConfig, rank: int) -> Iterator[Topology]:
    """The topology of `rank` among tp * pp * cp ranks that do not exist."""
    dist.init_process_group(
        "fake", store=dist.HashStore(), rank=rank, world_size=parallel.model_parallel_size
    )
    try:
        yield initialize(parallel.model_copy(update={"dp": 1}), gloo_groups=False)
    finally:
        shutdown()


def rehearse(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    stage: int,
    lengths: list[int],
    head_rows: int,
) -> StageMemory:
    """The memory of one rank of pipeline stage `stage`, tensors alone (no allocator, no library).

    lengths: tokens of each sequence of the micro-batch, of which `head_rows` go through the head.
    """
    with world(parallel, stage * parallel.tp * parallel.cp) as topology:
        with META, cpu_patch.current_device(META):
            stages = build_stages(shape, model, parallel, replace(topology, device=META))
        for part in stages:
            part.gpt.train()
            if hasattr(part.gpt, "rotary_pos_emb"):  # cached on the CPU
                part.gpt.rotary_pos_emb.inv_freq = part.gpt.rotary_pos_emb.inv_freq.to(META)
            for module in part.gpt.modules():
                if isinstance(module, PackedAttention):
                    module.attend = _attend  # type: ignore[method-assign]
        parameters = [p for part in stages for p in part.gpt.parameters()]
        for parameter in parameters:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32, device=META)
            # What megatron's DDP does: a gradient is added to the buffer and let go.
            parameter.register_post_accumulate_grad_hook(_let_go)
        with cpu_patch.current_device(META):
            held, peak = _run(stages, shape, parallel, topology, lengths, head_rows)
    return StageMemory(
        num_parameters=sum(p.numel() for p in parameters),
        weights=sum(p.numel() * p.element_size() for p in parameters),
        held_activations=held,
        passing_activations=peak,
    )


class _Rehearsed(LiveBytes):
    """Checks of values that do not exist are passed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 0
        return super().__torch_dispatch__(func, types, args, kwargs)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None) -> Tensor:
    """The kernel that scaled_dot_product_attention takes on a CPU; on meta it takes another."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, seen is None, attn_mask=seen, scale=scale)[0]


def _run(
    stages: list[Stage],
    shape: ModelShape,
    parallel: ParallelConfig,
    topology: Topology,
    lengths: list[int],
    head_rows: int,
) -> tuple[int, int]:
    """(bytes held between forward and backward, bytes at the peak) of all chunks together."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    num_tokens = sum(lengths) // parallel.cp
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device=META)
    known = [p for part in stages for p in part.gpt.parameters()]
    known += [p.main_grad for p in known]
    with _Rehearsed(META, known) as live:
        outputs, inputs = [], []
        for part in stages:
            gpt = part.gpt
            if not gpt.pre_process:
                width = num_tokens // (parallel.tp if parallel.sequence_parallel else 1)
                received = torch.empty(
                    width, 1, shape.hidden_size, dtype=gpt.config.params_dtype, device=META
                ).requires_grad_()
                inputs.append(received)
                gpt.set_input_tensor(received)
            output = gpt(tokens, tokens, None, packed_seq_params=params)
            if gpt.post_process:
                rows = torch.zeros(head_rows, dtype=torch.int64, device=META)
                hidden = output[0].index_select(0, rows)
                logprobs, entropy = linear_logprob_and_entropy(
                    hidden,
                    head_weight(gpt),
                    rows,
                    tp_group=topology.groups.tp,
                    vocab_size=shape.vocab_size,
                )
                output = logprobs.sum() + entropy.sum()
            outputs.append(output)
        held = live.now
        for output in reversed(outputs):
            output.backward(torch.ones_like(output))
    return held, live.peak

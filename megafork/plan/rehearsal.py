"""One rank's model, built for real on the meta device, and one micro-batch run through it there.

The shapes and lifetimes of all tensors are those of the real thing; no byte of them exists. A
rehearsal takes a world for itself (of torch's "fake" backend, whose collectives do nothing), so it
runs in a process that has none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megafork.config import ModelConfig, ParallelConfig
from megafork.errors import UserError
from megafork.model.gpt import head_input, head_weight
from megafork.model.layers import PackedAttention
from megafork.model.shape import ModelShape
from megafork.model.weights import build_stages
from megafork.ops.vocab_parallel import linear_logprob_and_entropy
from megafork.parallel import backend, cpu_patch
from megafork.parallel.mesh import Mesh, initialize, shutdown
from megafork.parallel.zigzag import Zigzag
from megafork.plan import stand_ins
from megafork.plan.live import LiveBytes

META = torch.device("meta")


@dataclass(frozen=True)
class MicroBatch:
    lengths: tuple[int, ...]
    """tokens that each sequence feeds"""
    head_rows: int
    """predictions that go through the head, on each of the cp ranks"""


@dataclass(frozen=True)
class ChunkMemory:
    """What one model chunk (a rank has vpp of them) takes of a micro-batch, in bytes."""

    num_parameters: int
    held: int
    """from its forward to its backward"""
    layers: int
    """beyond that, at the peak of its layers' forward or backward"""
    head: int
    """beyond that, at the peak of the head with the softmax over the vocabulary; 0 without one"""
    embedding: int
    """instead of that, at the peak of the embedding's backward, which comes last; 0 without one"""

    @property
    def passing(self) -> int:
        """Beyond what is held, at the highest of the peaks."""
        return max(self.layers, self.head, self.embedding - self.held)


@dataclass(frozen=True)
class Rehearsal:
    """Of one rank."""

    weights: int
    """bytes"""
    largest_weight: int
    """bytes"""
    chunks: tuple[ChunkMemory, ...]

    @property
    def num_parameters(self) -> int:
        return sum(chunk.num_parameters for chunk in self.chunks)


@contextmanager
def world(parallel: ParallelConfig, rank: int) -> Iterator[Mesh]:
    """The mesh of `rank` among tp * pp * cp ranks that do not exist.

    Raises UserError where the process has another world or would use a GPU.
    """
    if dist.is_initialized() or backend.has_cuda():
        raise UserError(
            "a rehearsal needs a process without a process group and without a GPU: set "
            "CUDA_VISIBLE_DEVICES= (to nothing), or use `megafork plan`"
        )
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
    micro_batch: MicroBatch,
    *,
    pp_rank: int,
    device: Literal["cpu", "cuda"],
) -> Rehearsal:
    """The memory of one rank at `pp_rank`: tensors alone (no allocator, no library).

    device: whose kernels run. Data-parallel ranks are alike: parallel.dp plays no part.
    """
    alike = parallel.model_copy(update={"dp": None})
    return _rehearse(shape, model, alike, micro_batch, pp_rank, device)


def rehearse_shallow(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batch: MicroBatch,
    *,
    pp_rank: int,
    device: Literal["cpu", "cuda"],
) -> Rehearsal:
    """`rehearse`, from stages of two and of three layers: layers are alike, so all that is held is
    a straight line. The same numbers, and quicker for deep models."""
    depths = [len(layers) for layers in shape.stage_layers(parallel)][pp_rank :: parallel.pp]
    if min(depths) < 2:
        return rehearse(shape, model, parallel, micro_batch, pp_rank=pp_rank, device=device)

    def of(depth: int) -> Rehearsal:
        shallow = replace(shape, num_layers=depth * parallel.num_stages)
        even = parallel.model_copy(update={"pipeline_layers": None})
        return rehearse(shallow, model, even, micro_batch, pp_rank=pp_rank, device=device)

    two, three = of(2), of(3)

    def at(depth: int, a: int, b: int) -> int:
        return a + (depth - 2) * (b - a)

    chunks = zip(depths, two.chunks, three.chunks, strict=True)
    of_layer = (three.weights - two.weights) // len(depths)
    return Rehearsal(
        weights=two.weights + (sum(depths) - 2 * len(depths)) * of_layer,
        largest_weight=two.largest_weight,
        chunks=tuple(
            ChunkMemory(*(at(n, getattr(a, f.name), getattr(b, f.name)) for f in fields(a)))
            for n, a, b in chunks
        ),
    )


@functools.lru_cache(maxsize=1024)
def _rehearse(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batch: MicroBatch,
    pp_rank: int,
    device: Literal["cpu", "cuda"],
) -> Rehearsal:
    with world(parallel, pp_rank * parallel.tp * parallel.cp) as mesh:
        with META, cpu_patch.current_device(META):
            stages = build_stages(shape, model, parallel, replace(mesh, device=META))
        gpts = [stage.gpt for stage in stages]
        parameters = [p for gpt in gpts for p in gpt.parameters()]
        for gpt in gpts:
            gpt.train()
            if hasattr(gpt, "rotary_pos_emb"):  # cached on the CPU
                gpt.rotary_pos_emb.inv_freq = gpt.rotary_pos_emb.inv_freq.to(META)
            for module in gpt.modules():
                if isinstance(module, PackedAttention):
                    module.attend = _attend  # type: ignore[method-assign]
        for parameter in parameters:
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32, device=META)
            # What megatron's DDP does: a gradient is added to the buffer and let go.
            parameter.register_post_accumulate_grad_hook(_let_go)
        fused = stand_ins.in_place(gpts) if device == "cuda" else nullcontext()
        with cpu_patch.current_device(META), fused:
            run = _Run(shape, parallel, mesh, micro_batch, in_triton=device == "cuda")
            chunks = run.through(gpts)
    sizes = [p.numel() * p.element_size() for p in parameters]
    return Rehearsal(
        weights=sum(sizes),
        largest_weight=max(sizes),
        chunks=chunks,
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


def _announce(live: LiveBytes, index: int, module: Any, given: Any, embedded: Tensor) -> None:
    """With the gradient of what the embedding gave, its own backward begins."""
    embedded.register_hook(lambda _: live.enter(f"embedding {index}"))


class _Run:
    """One micro-batch through a rank's chunks: all forward, then all backward."""

    def __init__(
        self,
        shape: ModelShape,
        parallel: ParallelConfig,
        mesh: Mesh,
        micro_batch: MicroBatch,
        *,
        in_triton: bool,
    ) -> None:
        self.shape, self.mesh, self.in_triton = shape, mesh, in_triton
        part = Zigzag(mesh.cp_rank, mesh.cp_size, parallel.tp if parallel.sequence_parallel else 1)
        lengths = [part.padded(length) for length in micro_batch.lengths]
        padding = -sum(lengths) % part.pack_multiple
        lengths += [padding] if padding else []
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )
        self.num_tokens = sum(lengths) // mesh.cp_size
        self.tokens = torch.zeros(1, self.num_tokens, dtype=torch.int64, device=META)
        self.received = self.num_tokens // (parallel.tp if parallel.sequence_parallel else 1)
        self.num_rows = min(micro_batch.head_rows, self.num_tokens)

    def through(self, gpts: list[GPTModel]) -> tuple[ChunkMemory, ...]:
        known = [p for gpt in gpts for p in gpt.parameters()]
        known += [p.main_grad for p in known]
        with _Rehearsed(META, known) as live:
            outputs, held = [], [0]
            for index, gpt in enumerate(gpts):
                live.enter(f"layers {index}")
                outputs.append(self._forward(gpt, index, live))
                held.append(live.now)
            for index in reversed(range(len(gpts))):
                live.enter(f"layers {index}")
                output = outputs.pop()
                output.backward(torch.ones_like(output))
                del output
        return tuple(
            ChunkMemory(
                num_parameters=sum(p.numel() for p in gpts[index].parameters()),
                held=after - before,
                layers=max(0, live.peaks[f"layers {index}"] - after),
                head=max(0, live.peaks.get(f"head {index}", 0) - after),
                embedding=max(0, live.peaks.get(f"embedding {index}", 0) - before),
            )
            for index, (before, after) in enumerate(itertools.pairwise(held))
        )

    def _forward(self, gpt: GPTModel, index: int, live: LiveBytes) -> Tensor:
        if not gpt.pre_process:
            received = torch.empty(
                self.received,
                1,
                self.shape.hidden_size,
                dtype=gpt.config.params_dtype,
                device=META,
            )
            gpt.set_input_tensor(received.requires_grad_())
        else:
            gpt.embedding.register_forward_hook(functools.partial(_announce, live, index))
        hidden = gpt(self.tokens, self.tokens, None, packed_seq_params=self.params)
        return self._head(gpt, hidden, index, live) if gpt.post_process else hidden

    def _head(self, gpt: GPTModel, hidden_1TH: Tensor, index: int, live: LiveBytes) -> Tensor:
        slots_N = torch.arange(self.num_rows) * self.num_tokens // max(1, self.num_rows)
        live.enter(f"head {index}")
        rows_NH = head_input(gpt, hidden_1TH, slots_N)
        if self.in_triton:
            logprobs, entropy = stand_ins.TritonHead.apply(rows_NH, head_weight(gpt))
        else:
            logprobs, entropy = linear_logprob_and_entropy(
                rows_NH,
                head_weight(gpt),
                torch.zeros(self.num_rows, dtype=torch.int64, device=META),
                tp_group=self.mesh.groups.tp,
                vocab_size=self.shape.vocab_size,
            )
        live.enter(f"layers {index}")
        loss = logprobs.sum() + entropy.sum()
        loss.register_hook(lambda _: live.enter(f"head {index}"))
        # Once its gradient is there, the layers' backward begins.
        hidden_1TH.register_hook(lambda _: live.enter(f"layers {index}"))
        return loss

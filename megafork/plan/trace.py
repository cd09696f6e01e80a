"""Tensor bytes of one rank: its model on the meta device, and a traced micro-batch through it.

The shapes and lifetimes of all tensors are those of the real model; no byte of them exists. A trace
takes a world for itself (of torch's "fake" backend, whose collectives do nothing), so it runs in a
process that has none. LiveBytes counts the bytes, and not torch's MemTracker, which gives the same
figures and says its peak of each phase through private attributes alone.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from megafork.plan import fake_kernels

META = torch.device("meta")


@dataclass(frozen=True)
class MicroBatch:
    """A rank's packed sequences."""

    lengths: tuple[int, ...]
    """tokens that each sequence feeds"""
    head_rows: int
    """predictions that go through the head, on each of the cp ranks"""


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes that a micro-batch takes in one model chunk (a rank has vpp of them)."""

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
        """Bytes beyond what is held, at the highest of the peaks."""
        return max(self.layers, self.head, self.embedding - self.held)


@dataclass(frozen=True)
class Trace:
    """Bytes of one rank's weights, and of a micro-batch in each of its chunks."""

    weights: int
    largest_weight: int
    chunks: tuple[ChunkMemory, ...]

    @property
    def num_parameters(self) -> int:
        return sum(chunk.num_parameters for chunk in self.chunks)


def trace_model(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batch: MicroBatch,
    *,
    pp_rank: int,
    device: Literal["cpu", "cuda"],
    quick: bool = False,
) -> Trace:
    """Return the memory of one rank at `pp_rank`: tensors alone, no allocator and no library.

    device: whose kernels run. quick: from stages of two and of three layers. Layers are alike, so
    the same numbers lie on a straight line, and a deep model takes less time.

    Raises UserError where the process has a world or would use a GPU.
    """
    parallel = parallel.model_copy(update={"dp": None})  # data-parallel ranks are alike
    depths = [len(layers) for layers in shape.stage_layers(parallel)][pp_rank :: parallel.pp]
    if not quick or min(depths) < 2:
        return _trace(shape, model, parallel, micro_batch, pp_rank, device)

    def of_depth(depth: int) -> Trace:
        shallow = replace(shape, num_layers=depth * parallel.num_stages)
        even = parallel.model_copy(update={"pipeline_layers": None})
        return _trace(shallow, model, even, micro_batch, pp_rank, device)

    two, three = of_depth(2), of_depth(3)

    def line(depth: int, at_two: int, at_three: int) -> int:
        return at_two + (depth - 2) * (at_three - at_two)

    chunks = zip(depths, two.chunks, three.chunks, strict=True)
    of_layer = (three.weights - two.weights) // len(depths)
    return Trace(
        weights=two.weights + (sum(depths) - 2 * len(depths)) * of_layer,
        largest_weight=two.largest_weight,
        chunks=tuple(
            ChunkMemory(*(line(n, getattr(a, f.name), getattr(b, f.name)) for f in fields(a)))
            for n, a, b in chunks
        ),
    )


@contextmanager
def world(parallel: ParallelConfig, rank: int) -> Iterator[Mesh]:
    """Make the mesh of `rank` among tp * pp * cp ranks that do not exist.

    Raises UserError where the process has another world or would use a GPU.
    """
    if dist.is_initialized() or backend.has_cuda():
        raise UserError(
            "tracing a model needs a process without a process group and without a GPU: set "
            "CUDA_VISIBLE_DEVICES= (to nothing), or use `megafork plan`"
        )
    dist.init_process_group(
        "fake", store=dist.HashStore(), rank=rank, world_size=parallel.model_parallel_size
    )
    try:
        yield initialize(parallel.model_copy(update={"dp": 1}), gloo_groups=False)
    finally:
        shutdown()


@functools.lru_cache(maxsize=1024)
def _trace(
    shape: ModelShape,
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batch: MicroBatch,
    pp_rank: int,
    device: Literal["cpu", "cuda"],
) -> Trace:
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
        fused = fake_kernels.in_place(gpts) if device == "cuda" else nullcontext()
        with cpu_patch.current_device(META), fused:
            run = _Run(shape, parallel, mesh, micro_batch, in_triton=device == "cuda")
            chunks = run.through(gpts)
    sizes = [p.numel() * p.element_size() for p in parameters]
    return Trace(weights=sum(sizes), largest_weight=max(sizes), chunks=chunks)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the meta storages that operations made in this context and that are held.

    known: tensors that were there before; their views are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        """by phase"""
        self._phase = ""
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}

    def enter(self, phase: str) -> None:
        """Raise the peak of `phase` from here on."""
        self._phase = phase
        self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # A check of a value, which does not exist here, passes.
            return True if args[0].dtype == torch.bool else 0
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self._note()
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._alive.pop(key)

    def _note(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.now)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None) -> Tensor:
    """Attend with a CPU's kernel; scaled_dot_product_attention takes another one on meta."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, seen is None, attn_mask=seen, scale=scale)[0]


def _announce(live: LiveBytes, index: int, module: Any, given: Any, embedded: Tensor) -> None:
    """Enter the embedding's phase with its output's gradient, where its own backward begins."""
    embedded.register_hook(lambda _: live.enter(f"embedding {index}"))


class _Run:
    """A micro-batch on its way through a rank's chunks: all forward, then all backward."""

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
        """Return the bytes of each chunk, in order."""
        known = [p for gpt in gpts for p in gpt.parameters()]
        known += [p.main_grad for p in known]
        with LiveBytes(known) as live:
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
            size, dtype = (self.received, 1, self.shape.hidden_size), gpt.config.params_dtype
            received = torch.empty(size, dtype=dtype, device=META)
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
            logprobs, entropy = fake_kernels.TritonHead.apply(rows_NH, head_weight(gpt))
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

"""The memory of a machine without a GPU, which ranks and rollout servers share.

A run that needs more is ended by the kernel, process by process, without a word: it is told before
anything is started, with what to lower.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megafork.config import TrainConfig
from megafork.errors import UserError
from megafork.model.shape import ModelShape, padded_vocab_size
from megafork.ops import bfloat16_products
from megafork.plan.nodes import DTYPE_BYTES, GIB, num_parameters
from megafork.system.heap import KEPT, available

if TYPE_CHECKING:
    from megafork.plan.memory import StageMemory

RANK_PROCESS = int(0.45 * GIB)
"""A rank's interpreter, libraries and buffers: measured"""
CONTROLLER_PROCESS, AGENT_PROCESS = int(0.25 * GIB), int(0.07 * GIB)
"""Without tokens; the controller's with what draws the report: measured"""
SERVER_PROCESS = int(1.3 * GIB)
"""A vLLM server's processes without weights and cache: measured"""
_SERVER_WEIGHTS = 2
"""Copies of a server on the CPU: as they are loaded, and as its kernels pack them; measured"""
_HEAD_ROWS = 16
"""that are traced: of thousands, row by row, it takes a minute"""
_HEAD_CHUNK = 4 << 25
"""what a head of many rows has beside them, of the logits at a time (ops/vocab_parallel.py)"""


@dataclass(frozen=True)
class MachineMemory:
    """Bytes of all processes together, in an update with all responses at full length."""

    model: int
    """weights, gradients and optimizer of every rank"""
    update: int
    """beside them: activations of full micro-batches, or gradients on their way"""
    save: int
    """a checkpoint that is written while the next update changes what it holds"""
    servers: int
    """weights, KV cache and processes"""
    processes: int
    """of launcher, controller and agent, and of the ranks without their tensors but with what their
    heaps keep"""

    @property
    def total(self) -> int:
        return self.model + self.update + self.save + self.servers + self.processes


def machine_memory(config: TrainConfig, shape: ModelShape) -> MachineMemory:
    """Plan the memory of a run; only in a process that has no world. Imports megatron-core."""
    from megafork.plan.memory import training_memory, worst_micro_batch

    parallel, dp = config.parallel, config.parallel.dp or 1
    micro_batch, number = worst_micro_batch(config, dp)
    few = replace(micro_batch, head_rows=min(_HEAD_ROWS, micro_batch.head_rows))
    stages = training_memory(config, shape, dp, few, number, device="cpu", quick=True)
    of_stage = parallel.world_size // parallel.pp
    widened = _HEAD_CHUNK + _widened_head(config, shape)
    return MachineMemory(
        model=of_stage * sum(stage.static for stage in stages),
        update=of_stage * (sum(map(_beside_the_model, stages)) + widened),
        save=of_stage * sum(stage.parameters + stage.optimizer for stage in stages)
        if config.checkpoint.asynchronous
        else 0,
        servers=_servers(config, shape),
        processes=_processes(parallel.world_size) + parallel.world_size * KEPT,
    )


def _processes(num_ranks: int) -> int:
    """Return what all processes but the servers' have without tensors and tokens."""
    return (num_ranks + 1) * RANK_PROCESS + CONTROLLER_PROCESS + AGENT_PROCESS


def check_machine(config: TrainConfig) -> None:
    """Raise UserError for a run that this machine cannot hold; warn where it is not free now.

    Nothing is traced, which takes seconds, where an upper bound fits.
    """
    shape = ModelShape.from_folder(config.model.path)
    total, free = available()
    if _at_most(config, shape) < min(total, free):
        return
    # A trace leaves megatron's globals behind, and this process may become a rank.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        needs = pool.submit(machine_memory, config, shape).result()
    if needs.total > total:
        raise UserError(problem(needs, total, config))
    if needs.total > free:
        print(
            f"warning: the run needs up to {needs.total / GIB:.1f} GiB of memory, and "
            f"{free / GIB:.1f} of this machine's {total / GIB:.1f} are free: the kernel may end it",
            file=sys.stderr,
        )


def machine_lines(needs: MachineMemory) -> Iterator[str]:
    total, free = available()
    parts = {
        "weights, gradients, optimizer": needs.model,
        "an update's activations": needs.update,
        "a checkpoint being written": needs.save,
        "rollout servers": needs.servers,
        "ranks' and launcher's processes": needs.processes,
    }
    for name, count in parts.items():
        yield f"{name:<32} {count / GIB:7.2f} GiB"
    yield f"{'in all, at most':<32} {needs.total / GIB:7.2f} GiB"
    yield f"{'this machine':<32} {total / GIB:7.2f} GiB, {free / GIB:.2f} of them free now"


def problem(needs: MachineMemory, total: int, config: TrainConfig) -> str:
    """Say what does not fit, and what to lower: the largest part that can be."""
    training = config.training
    ways = {
        needs.update: f"lower training.micro_batch_tokens={training.micro_batch_tokens}"
        + ("" if config.model.recompute == "full" else " or set model.recompute=full"),
        needs.save: "set checkpoint.asynchronous=false",
        needs.servers: f"lower rollout.servers={config.rollout.servers} or "
        * (config.rollout.servers > 1)
        + "use a rollout server on another machine (rollout.url)",
    }
    largest = max(ways)
    way = ways[largest]
    if needs.total - largest > total:
        way = "take a smaller model or a larger machine; with a GPU, plan with --node"
    return (
        f"the run needs {needs.total / GIB:.1f} GiB of memory and this machine has "
        f"{total / GIB:.1f}: model {needs.model / GIB:.1f}, update {needs.update / GIB:.1f}, "
        f"checkpoint {needs.save / GIB:.1f}, servers {needs.servers / GIB:.1f}, processes "
        f"{needs.processes / GIB:.1f}; {way}"
    )


def _beside_the_model(stage: StageMemory) -> int:
    return max(stage.activations + stage.passing, stage.head, stage.reduction, stage.transfer)


def _widened_head(config: TrainConfig, shape: ModelShape) -> int:
    """The head's weight and its gradient in float32, where bfloat16 is multiplied in it."""
    if config.model.dtype != "bfloat16" or not bfloat16_products.are_slow():
        return 0
    padded = padded_vocab_size(shape, config.model, config.parallel)
    return 2 * 4 * padded // config.parallel.tp * shape.hidden_size


def _servers(config: TrainConfig, shape: ModelShape) -> int:
    rollout = config.rollout
    if rollout.url is not None:
        return 0
    weights = num_parameters(shape) * DTYPE_BYTES[rollout.dtype or config.model.dtype]
    cache = rollout.cpu_kv_cache_gib * GIB
    return rollout.servers * (_SERVER_WEIGHTS * weights + cache + SERVER_PROCESS)


def _at_most(config: TrainConfig, shape: ModelShape) -> int:
    """More than `machine_memory` finds, by arithmetic alone.

    Of a token in a layer: what its products, norms and attention keep for backward, in float32.
    """
    parallel = config.parallel
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    of_a_token = shape.num_layers * (
        20 * shape.hidden_size + 6 * shape.intermediate_size + 2 * shape.num_heads * longest
    )
    activations = 4 * config.training.micro_batch_tokens * parallel.pp * of_a_token
    activations += _HEAD_CHUNK + _widened_head(config, shape)
    state = 36 * num_parameters(shape) * (2 if config.algorithm.uses_critic else 1)
    ranks = parallel.world_size * (activations + KEPT) + _processes(parallel.world_size)
    return state * (parallel.dp or 1) + ranks + _servers(config, shape)

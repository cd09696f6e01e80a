"""Bytes on each GPU of a layout: the trainer's by pipeline rank, the servers', and the host's.

Parameters and activations come from a rehearsal of the real model (rehearsal.py), everything that
follows from them by arithmetic is here. What is no tensor of ours is an allowance, named RESERVE or
SLEEPING below: CUDA context, NCCL's buffers, cuBLAS workspaces, the allocator's fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megafork.config import ParallelConfig, TrainConfig
from megafork.model.shape import ModelShape, padded_vocab_size
from megafork.plan.nodes import GIB, NodeType
from megafork.plan.parts import HostMemory, StageMemory
from megafork.plan.rehearsal import (
    ChunkMemory,
    MicroBatch,
    Rehearsal,
    rehearse,
    rehearse_shallow,
)
from megafork.plan.roofline import data_parallel_size
from megafork.plan.serving import DTYPE_BYTES, ServerMemory, server_memory, server_problems

RESERVE = 4 * GIB
"""of a GPU, for the trainer: not measured"""
SLEEPING = 2 * GIB
"""of a GPU, for a server that sleeps: its context, NCCL, CUDA graphs; not measured"""
HOST_PROCESS = 4 * GIB
"""of a node, for each rank: libraries, CUDA's host side; not measured"""
_GRADIENT_BYTES, _MASTER_AND_MOMENTS = 4, 12
_ROW_BYTES, _PROMPT_BYTES = 25, 8
"""of a response token and of a prompt's in the token table (data/token_table.py)"""
_COLLECTED_BYTES, _LEADER_BYTES = 8, 12
"""of a response token in a Sample's arrays, where all are collected; and as a replica's first rank
gets its rows, before they are in the table"""


@dataclass(frozen=True)
class MemoryPlan:
    dp: int
    micro_batch: MicroBatch
    num_micro_batches: int
    """of each rank in an update, all responses at full length"""
    stages: tuple[StageMemory, ...]
    server: ServerMemory
    host: HostMemory
    turns: dict[str, int]
    """bytes of a GPU in each turn; the largest counts"""
    problems: tuple[str, ...]
    """what does not fit, and what to change"""

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def largest_stage(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)


def plan_memory(
    config: TrainConfig,
    shape: ModelShape,
    node: NodeType,
    num_train_nodes: int,
    num_serve_nodes: int = 0,
    *,
    server_gpus: int | None = None,
    reserve: int = RESERVE,
    quick: bool = False,
) -> MemoryPlan:
    """What `config` needs of these nodes when all responses have their full length.

    num_serve_nodes: beside the training ones. server_gpus: of a node with servers, if more than
    train there. quick: by `rehearse_shallow`.

    Raises UserError where the model cannot be split this way, where layout and nodes do not go
    together, and in a process that has a world.
    """
    shape.check(config.model, config.parallel)
    dp = data_parallel_size(config, node, num_train_nodes)
    micro_batch, num_micro_batches = worst_micro_batch(config, dp)
    stages = training_memory(
        config,
        shape,
        dp,
        micro_batch,
        num_micro_batches,
        device="cuda",
        reserve=reserve,
        quick=quick,
    )
    server = server_memory(config, shape, node)
    host = _host_memory(config, node, stages, dp)
    turns = _turns(config, stages, server)
    problems = [
        *_training_problems(config, node, stages, turns, micro_batch),
        *server_problems(config, shape, server, server_gpus or node.gpus),
    ]
    if host.total > node.host_memory:
        problems.append(
            f"a node's host needs {host.total / GIB:.0f} GiB and has {node.host_memory_gib:.0f} "
            f"(checkpoint {host.checkpoint / GIB:.0f}, token table {host.token_table / GIB:.0f}, "
            f"reference {host.reference / GIB:.0f}, offload {host.offload / GIB:.0f}): raise "
            "parallel.tp, pp or dp, so that each rank holds less, or lower rollout.prompts_per_step"
        )
    return MemoryPlan(
        dp, micro_batch, num_micro_batches, stages, server, host, turns, tuple(problems)
    )


def worst_micro_batch(config: TrainConfig, dp: int) -> tuple[MicroBatch, int]:
    """A full micro-batch of the longest sequences with all rows in the head, and their number."""
    parallel = config.parallel
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens - 1
    longest = parallel.tokens_on_one_rank(longest) * parallel.cp
    responses = config.training.prompts_per_minibatch * config.rollout.group_size
    of_rank = -(-responses // dp)
    budget = config.training.micro_batch_tokens * parallel.cp
    whole, rest = divmod(min(budget, of_rank * longest), longest)
    rest -= rest % (2 * parallel.cp)
    lengths = (longest,) * whole + ((rest,) if rest else ())
    number = -(-of_rank // max(1, whole))
    number += -number % (parallel.pp if parallel.vpp > 1 else 1)
    return MicroBatch(lengths, head_rows=sum(lengths) // parallel.cp), number


def training_memory(
    config: TrainConfig,
    shape: ModelShape,
    dp: int,
    micro_batch: MicroBatch,
    num_micro_batches: int,
    *,
    device: Literal["cpu", "cuda"],
    reserve: int = 0,
    quick: bool = False,
) -> tuple[StageMemory, ...]:
    """Of one rank of each pipeline rank. Stages that are alike are rehearsed once."""
    parallel = config.parallel
    sizes = [len(layers) for layers in shape.stage_layers(parallel)]
    rehearsed: dict[tuple[object, ...], Rehearsal] = {}
    stages = []
    for pp_rank in range(parallel.pp):
        own = tuple(sizes[pp_rank :: parallel.pp])
        kind = (own, pp_rank == 0, pp_rank == parallel.pp - 1)
        if kind not in rehearsed:
            rehearsed[kind] = (rehearse_shallow if quick else rehearse)(
                shape, config.model, parallel, micro_batch, pp_rank=pp_rank, device=device
            )
        rehearsal = rehearsed[kind]
        held, passing = peak_in_flight(rehearsal.chunks, parallel, pp_rank, num_micro_batches)
        stages.append(
            StageMemory(
                pp_rank=pp_rank,
                num_layers=sum(own),
                num_parameters=rehearsal.num_parameters,
                parameters=rehearsal.weights,
                gradients=_GRADIENT_BYTES * rehearsal.num_parameters,
                optimizer=_optimizer_bytes(config, dp, rehearsal.num_parameters),
                critic=_critic_bytes(config, shape, dp, rehearsal, pp_rank),
                activations=held,
                passing=passing,
                head=max(chunk.head for chunk in rehearsal.chunks),
                reduction=_reduction_bytes(rehearsal) if device == "cpu" else 0,
                transfer=_transfer_bytes(config, rehearsal),
                bucket=_bucket_bytes(config, rehearsal),
                reserve=reserve,
            )
        )
    return tuple(stages)


def peak_in_flight(
    chunks: tuple[ChunkMemory, ...], parallel: ParallelConfig, pp_rank: int, num_micro_batches: int
) -> tuple[int, int]:
    """(bytes held, bytes passing) when their sum is largest in megatron's schedule.

    1F1B: pp - rank - 1 micro-batches go ahead, then forward and backward take turns. Interleaved
    (vpp > 1): rounds of pp micro-batches through each chunk, 2 (pp - rank - 1) + (vpp - 1) pp ahead
    (megatron-core's get_pp_rank_microbatches and get_schedule_table).
    """
    pp, vpp = parallel.pp, len(chunks)
    if vpp == 1:
        forward, ahead = [0] * min(num_micro_batches, pp + 1), pp - pp_rank - 1  # it repeats
    else:
        rounds = range(0, num_micro_batches, pp)
        forward = [
            chunk
            for first in rounds
            for chunk in range(vpp)
            for _ in range(min(pp, num_micro_batches - first))
        ]
        ahead = 2 * (pp - pp_rank - 1) + (vpp - 1) * pp
    ahead = min(ahead, len(forward))
    held, best = 0, (0, 0)
    for step in range(len(forward) + ahead):
        if step < len(forward):
            held += chunks[forward[step]].held
            best = max(best, (held, chunks[forward[step]].passing), key=sum)
        if step >= ahead:  # the same order of rounds, chunks from last to first
            chunk = chunks[vpp - 1 - forward[step - ahead]]
            best = max(best, (held, chunk.passing), key=sum)
            held -= chunk.held
    return best


def _optimizer_bytes(config: TrainConfig, dp: int, num_parameters: int) -> int:
    """In float32 the weights are their own main copy."""
    per_parameter = _MASTER_AND_MOMENTS - (4 if config.model.dtype == "float32" else 0)
    return per_parameter * num_parameters // (dp * config.parallel.cp)


def _critic_bytes(
    config: TrainConfig, shape: ModelShape, dp: int, policy: Rehearsal, pp_rank: int
) -> int:
    """Its layers are the policy's; in place of the vocabulary's head it has one for a value."""
    if config.algorithm.advantages != "gae":
        return 0
    parallel, number = config.parallel, policy.num_parameters
    if pp_rank == parallel.pp - 1:
        number += shape.hidden_size + 1
        if not shape.tied_embeddings or parallel.pp > 1:
            padded = padded_vocab_size(shape, config.model, parallel)
            number -= padded // parallel.tp * shape.hidden_size
    static = number * (DTYPE_BYTES[config.model.dtype] + _GRADIENT_BYTES)
    return static + _optimizer_bytes(config, dp, number)


def _reduction_bytes(rehearsal: Rehearsal) -> int:
    """Each chunk has a buffer of its own."""
    return _GRADIENT_BYTES * max(chunk.num_parameters for chunk in rehearsal.chunks)


def _transfer_bytes(config: TrainConfig, rehearsal: Rehearsal) -> int:
    """The largest tensor, gathered and joined, with two buckets; or the reference's swap of it."""
    tp = config.parallel.tp
    gathered = 2 * tp * rehearsal.largest_weight if tp > 1 else 0
    return max(gathered + 2 * _bucket_bytes(config, rehearsal), rehearsal.largest_weight)


def _bucket_bytes(config: TrainConfig, rehearsal: Rehearsal) -> int:
    """A tensor that is larger than sync.bucket_mib has a bucket of its own."""
    most, tp = config.sync.bucket_mib << 20, config.parallel.tp
    return tp * max(rehearsal.largest_weight, min(most // tp, rehearsal.weights))


def _host_memory(
    config: TrainConfig, node: NodeType, stages: tuple[StageMemory, ...], dp: int
) -> HostMemory:
    """Of the first node, where the responses of all batches under way are collected."""
    rollout, largest = config.rollout, max(stages, key=lambda stage: stage.num_parameters)
    responses = rollout.prompts_per_step * rollout.group_size
    prompts = responses * _PROMPT_BYTES * config.data.max_prompt_tokens
    share = -(-responses // dp) * rollout.max_response_tokens
    collected = responses * rollout.max_response_tokens * (1 + rollout.max_policy_lag)
    leaders = -(-node.gpus // config.parallel.model_parallel_size)
    has_reference = bool(config.kl.coefficient or config.forking.compare_every)
    state = largest.parameters + _MASTER_AND_MOMENTS * largest.num_parameters
    state //= dp * config.parallel.cp
    state *= 2 if config.algorithm.advantages == "gae" else 1  # a critic's
    return HostMemory(
        processes=node.gpus * HOST_PROCESS,
        token_table=node.gpus * (share * _ROW_BYTES + prompts)
        + leaders * share * _LEADER_BYTES
        + collected * _COLLECTED_BYTES,
        reference=node.gpus * largest.parameters * has_reference,
        checkpoint=node.gpus * state,
        offload=node.gpus * largest.put_away if rollout.placement == "colocated" else 0,
    )


def _turns(
    config: TrainConfig, stages: tuple[StageMemory, ...], server: ServerMemory
) -> dict[str, int]:
    """Bytes of a GPU: the trainer and a server each have their own, or one after the other."""
    trainer = max(stage.total for stage in stages)
    if config.rollout.placement == "disaggregated":
        return {"trainer": trainer, "server": server.total}
    reserve = stages[0].reserve
    handover = max(stage.parameters + stage.transfer + stage.bucket for stage in stages)
    return {
        "trainer": trainer + SLEEPING,
        "handover": handover + reserve + server.weights + SLEEPING,
        "server": server.total + reserve,
    }


def _training_problems(
    config: TrainConfig,
    node: NodeType,
    stages: tuple[StageMemory, ...],
    turns: dict[str, int],
    micro_batch: MicroBatch,
) -> list[str]:
    limit, problems = node.gpu_memory, []
    have = f"a GPU of {node.name} has {limit / GIB:.1f} GiB"
    if (trainer := turns["trainer"]) > limit:
        worst = max(stages, key=lambda stage: stage.total)
        needs = f"training needs {trainer / GIB:.1f} GiB (pipeline rank {worst.pp_rank}); {have}"
        problems.append(f"{needs}: {_remedy(config, worst, limit, micro_batch)}")
    if turns.get("handover", 0) > limit:
        problems.append(
            f"handing the weights over needs {turns['handover'] / GIB:.1f} GiB (the policy's and "
            f"the server's); {have}: raise parallel.tp, pp or rollout.tensor_parallel"
        )
    if turns["server"] > limit:
        share = config.rollout.gpu_memory_utilization
        most = math.floor(100 * (share - (turns["server"] - limit) / limit)) / 100
        problems.append(
            f"the servers' turn needs {turns['server'] / GIB:.1f} GiB; {have}: lower "
            f"rollout.gpu_memory_utilization={share:g} to {most:g}"
        )
    return problems


def _remedy(config: TrainConfig, stage: StageMemory, limit: int, micro_batch: MicroBatch) -> str:
    """What shrinks the largest part that can be shrunk."""
    model, parallel, training = config.model, config.parallel, config.training
    if stage.static + stage.reserve > 0.9 * limit:
        return (
            f"parameters, gradients and optimizer alone take {stage.static / GIB:.1f} GiB: raise "
            f"parallel.tp={parallel.tp} or pp={parallel.pp}; more nodes share the optimizer's "
            f"{stage.optimizer / GIB:.1f} GiB"
        )
    taken = f"activations take {(stage.activations + stage.passing) / GIB:.1f} GiB: "
    if model.recompute != "full":
        return f"{taken}set model.recompute=full (now {model.recompute})"
    if parallel.tp > 1 and not parallel.sequence_parallel:
        return f"{taken}set parallel.sequence_parallel=true"
    longest = micro_batch.lengths[0] // parallel.cp
    if training.micro_batch_tokens > longest:
        return (
            f"{taken}lower training.micro_batch_tokens={training.micro_batch_tokens}; one sequence "
            f"needs {longest + 1}"
        )
    return f"{taken}raise parallel.cp={parallel.cp} or tp={parallel.tp}"

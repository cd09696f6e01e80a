"""Bytes on each GPU of a layout: the trainer's by pipeline rank, the servers', and the host's.

Parameters and activations come from a trace of the real model (trace.py), everything that follows
from them by arithmetic is here. What is no tensor of ours is an allowance, named RESERVE, ENGINE or
SLEEPING below: CUDA context, NCCL's buffers, cuBLAS workspaces, the allocator's fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megafork.config import ParallelConfig, TrainConfig
from megafork.errors import UserError
from megafork.model.shape import ModelShape, padded_vocab_size
from megafork.plan.nodes import DTYPE_BYTES, GIB, Nodes, NodeType, num_parameters
from megafork.plan.trace import ChunkMemory, MicroBatch, Trace, trace_model

RESERVE = 4 * GIB
"""of a GPU, for the trainer: not measured"""
ENGINE = 4 * GIB
"""of a GPU, for a server's activations, CUDA graphs, NCCL and context: not measured"""
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
_MOST_RESPONSES = 10_000_000


@dataclass(frozen=True)
class StageMemory:
    """The parts of a training GPU's memory at one pipeline rank, in bytes."""

    pp_rank: int
    num_layers: int
    num_parameters: int
    parameters: int
    gradients: int
    """float32"""
    optimizer: int
    """this rank's share: moments, and in bfloat16 float32 weights"""
    critic: int
    """its parameters, gradients and optimizer"""
    activations: int
    """held by the micro-batches in flight, when most is needed"""
    passing: int
    """beside them at that moment: a layer's temporaries, or the head's"""
    head: int
    """at the head's own peak: chunks of logits, the softmax's sums, gradients of its rows"""
    reduction: int
    """instead of activations, while gradients are reduced: gloo's copy of them; NCCL makes none"""
    transfer: int
    """instead of activations: a weight sync's largest tensor, gathered and joined, and two buckets;
    or the reference's swap of that tensor"""
    bucket: int
    """of a weight sync, the largest; a server that takes it through local memory copies it"""
    reserve: int

    @property
    def static(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.critic

    @property
    def put_away(self) -> int:
        """Bytes that move to the host while colocated servers run: gradients are dropped."""
        own = self.parameters + self.optimizer
        return own + self.critic * own // (own + self.gradients)

    @property
    def training(self) -> int:
        """Bytes of tensors at the peak of an update."""
        return self.static + max(self.activations + self.passing, self.reduction)

    @property
    def total(self) -> int:
        return max(self.training, self.static + self.transfer) + self.reserve


@dataclass(frozen=True)
class HostMemory:
    """The parts of a training node's host memory, in bytes."""

    processes: int
    token_table: int
    reference: int
    checkpoint: int
    """what each rank writes of weights and optimizer state, until it is written"""
    offload: int
    """weights and optimizer while the servers have the GPUs"""

    @property
    def total(self) -> int:
        return self.processes + self.token_table + self.reference + self.checkpoint + self.offload


@dataclass(frozen=True)
class ServerMemory:
    """The parts of a server's GPU, in bytes; its responses are those of all its GPUs."""

    total: int
    """what rollout.gpu_memory_utilization grants it"""
    weights: int
    engine: int
    """an allowance, ENGINE"""
    kv_cache: int
    """what is left; negative: it does not start"""
    kv_bytes_per_token: int
    response_tokens: int
    """of the longest prompt with the longest response"""
    max_num_seqs: int

    @property
    def kv_tokens(self) -> int:
        return max(0, self.kv_cache) // self.kv_bytes_per_token

    @property
    def whole_responses(self) -> int:
        """The number of responses of full length that the cache holds at once."""
        return self.kv_tokens // self.response_tokens


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run, all responses at full length."""

    dp: int
    micro_batch: MicroBatch
    num_micro_batches: int
    """of each rank in an update"""
    stages: tuple[StageMemory, ...]
    server: ServerMemory
    host: HostMemory
    phases: dict[str, int]
    """bytes of a GPU while it trains, takes weights (colocated) and serves; the largest counts"""
    problems: tuple[str, ...]
    """what does not fit, and what to change"""

    @property
    def fits(self) -> bool:
        return not self.problems


def plan_memory(
    config: TrainConfig,
    shape: ModelShape,
    nodes: Nodes,
    *,
    server_gpus: int | None = None,
    quick: bool = False,
) -> MemoryPlan:
    """Plan what `config` needs of these nodes when all responses have their full length.

    server_gpus: of a node with servers, if more than train there. quick: see `trace_model`.

    Raises UserError where the model cannot be split this way, where layout and nodes do not go
    together, and in a process that has a world.
    """
    shape.check(config.model, config.parallel)
    node, dp = nodes.node, data_parallel_size(config, nodes)
    micro_batch, number = worst_micro_batch(config, dp)
    stages = training_memory(config, shape, dp, micro_batch, number, device="cuda", quick=quick)
    server = server_memory(config, shape, node)
    host = _host_memory(config, node, stages, dp)
    phases = _phases(config, stages, server)
    problems = [
        *_training_problems(config, node, stages, phases, micro_batch),
        *server_problems(config, shape, server, server_gpus or node.gpus),
    ]
    if host.total > node.host_memory:
        problems.append(
            f"a node's host needs {host.total / GIB:.0f} GiB and has {node.host_memory_gib:.0f} "
            f"(checkpoint {host.checkpoint / GIB:.0f}, token table {host.token_table / GIB:.0f}, "
            f"reference {host.reference / GIB:.0f}, offload {host.offload / GIB:.0f}): raise "
            "parallel.tp, pp or dp, so that each rank holds less, or lower rollout.prompts_per_step"
        )
    return MemoryPlan(dp, micro_batch, number, stages, server, host, phases, tuple(problems))


def worst_micro_batch(config: TrainConfig, dp: int) -> tuple[MicroBatch, int]:
    """Return a full micro-batch of the longest sequences and the number of them.

    All of its rows go through the head.
    """
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
    quick: bool = False,
) -> tuple[StageMemory, ...]:
    """Return the memory of a rank at each pipeline rank. Stages that are alike are traced once.

    device: on "cuda" it has RESERVE too, on "cpu" gloo's copy of the gradients.
    """
    parallel = config.parallel
    sizes = [len(layers) for layers in shape.stage_layers(parallel)]
    traces: dict[tuple[object, ...], Trace] = {}
    stages = []
    for pp_rank in range(parallel.pp):
        own = tuple(sizes[pp_rank :: parallel.pp])
        kind = (own, pp_rank == 0, pp_rank == parallel.pp - 1)
        if kind not in traces:
            traces[kind] = trace_model(
                *(shape, config.model, parallel, micro_batch),
                pp_rank=pp_rank,
                device=device,
                quick=quick,
            )
        trace, tp = traces[kind], parallel.tp
        # A tensor larger than sync.bucket_mib has a bucket of its own.
        in_bucket = min((config.sync.bucket_mib << 20) // tp, trace.weights)
        bucket = tp * max(trace.largest_weight, in_bucket)
        gathered = 2 * tp * trace.largest_weight if tp > 1 else 0
        # Each chunk has a gradient buffer of its own.
        largest_buffer = _GRADIENT_BYTES * max(chunk.num_parameters for chunk in trace.chunks)
        held, passing = peak_in_flight(trace.chunks, parallel, pp_rank, num_micro_batches)
        stages.append(
            StageMemory(
                pp_rank=pp_rank,
                num_layers=sum(own),
                num_parameters=trace.num_parameters,
                parameters=trace.weights,
                gradients=_GRADIENT_BYTES * trace.num_parameters,
                optimizer=_optimizer_bytes(config, dp, trace.num_parameters),
                critic=_critic_bytes(config, shape, dp, trace, pp_rank),
                activations=held,
                passing=passing,
                head=max(chunk.head for chunk in trace.chunks),
                reduction=largest_buffer if device == "cpu" else 0,
                transfer=max(gathered + 2 * bucket, trace.largest_weight),
                bucket=bucket,
                reserve=RESERVE if device == "cuda" else 0,
            )
        )
    return tuple(stages)


def peak_in_flight(
    chunks: tuple[ChunkMemory, ...], parallel: ParallelConfig, pp_rank: int, num_micro_batches: int
) -> tuple[int, int]:
    """Return (bytes held, bytes passing) when their sum is largest in megatron's schedule.

    1F1B: pp - rank - 1 micro-batches go ahead, then forward and backward alternate. Interleaved
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
    """Return the bytes of this rank's share. In float32 the weights are their own main copy."""
    per_parameter = _MASTER_AND_MOMENTS - (4 if config.model.dtype == "float32" else 0)
    return per_parameter * num_parameters // (dp * config.parallel.cp)


def _critic_bytes(
    config: TrainConfig, shape: ModelShape, dp: int, policy: Trace, pp_rank: int
) -> int:
    """Return the critic's bytes: the policy's but for its head, which is one for a value."""
    if not config.algorithm.uses_critic:
        return 0
    parallel, number = config.parallel, policy.num_parameters
    if pp_rank == parallel.pp - 1:
        number += shape.hidden_size + 1
        if not shape.tied_embeddings or parallel.pp > 1:
            padded = padded_vocab_size(shape, config.model, parallel)
            number -= padded // parallel.tp * shape.hidden_size
    static = number * (DTYPE_BYTES[config.model.dtype] + _GRADIENT_BYTES)
    return static + _optimizer_bytes(config, dp, number)


def _host_memory(
    config: TrainConfig, node: NodeType, stages: tuple[StageMemory, ...], dp: int
) -> HostMemory:
    """Return the first node's, where the responses of all batches under way are collected."""
    rollout, largest = config.rollout, max(stages, key=lambda stage: stage.num_parameters)
    responses = rollout.prompts_per_step * rollout.group_size
    prompts = responses * _PROMPT_BYTES * config.data.max_prompt_tokens
    share = -(-responses // dp) * rollout.max_response_tokens
    collected = responses * rollout.max_response_tokens * (1 + rollout.max_policy_lag)
    leaders = -(-node.gpus // config.parallel.model_parallel_size)
    has_reference = bool(config.kl.coefficient or config.forking.compare_every)
    state = largest.parameters + _MASTER_AND_MOMENTS * largest.num_parameters
    state //= dp * config.parallel.cp
    state *= 1 + config.algorithm.uses_critic
    return HostMemory(
        processes=node.gpus * HOST_PROCESS,
        token_table=node.gpus * (share * _ROW_BYTES + prompts)
        + leaders * share * _LEADER_BYTES
        + collected * _COLLECTED_BYTES,
        reference=node.gpus * largest.parameters * has_reference,
        checkpoint=node.gpus * state,
        offload=node.gpus * largest.put_away if rollout.placement == "colocated" else 0,
    )


def _phases(
    config: TrainConfig, stages: tuple[StageMemory, ...], server: ServerMemory
) -> dict[str, int]:
    """Return the bytes of a GPU in each phase; not colocated, each phase has GPUs of its own."""
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
    phases: dict[str, int],
    micro_batch: MicroBatch,
) -> list[str]:
    limit, problems = node.gpu_memory, []
    have = f"a GPU of {node.name} has {limit / GIB:.1f} GiB"
    if (trainer := phases["trainer"]) > limit:
        worst = max(stages, key=lambda stage: stage.total)
        needs = f"training needs {trainer / GIB:.1f} GiB (pipeline rank {worst.pp_rank}); {have}"
        problems.append(f"{needs}: {_remedy(config, worst, limit, micro_batch)}")
    if phases.get("handover", 0) > limit:
        problems.append(
            f"handing the weights over needs {phases['handover'] / GIB:.1f} GiB (the policy's and "
            f"the server's); {have}: raise parallel.tp, pp or rollout.tensor_parallel"
        )
    if phases["server"] > limit:
        share = config.rollout.gpu_memory_utilization
        most = math.floor(100 * (share - (phases["server"] - limit) / limit)) / 100
        problems.append(
            f"the servers' phase needs {phases['server'] / GIB:.1f} GiB; {have}: lower "
            f"rollout.gpu_memory_utilization={share:g} to {most:g}"
        )
    return problems


def _remedy(config: TrainConfig, stage: StageMemory, limit: int, micro_batch: MicroBatch) -> str:
    """Say what shrinks the largest part that can be shrunk."""
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


def data_parallel_size(config: TrainConfig, nodes: Nodes) -> int:
    """Return the trainer's on these nodes. Raises UserError where the layout does not fit them."""
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    if responses > _MOST_RESPONSES:
        raise UserError(
            f"rollout.prompts_per_step * rollout.group_size = {responses:,} are more responses "
            f"than a plan counts ({_MOST_RESPONSES:,}): lower rollout.prompts_per_step"
        )
    parallel = config.parallel
    dp, rest = divmod(nodes.train_gpus, parallel.model_parallel_size)
    if rest or dp == 0 or parallel.dp not in (None, dp):
        want = f"parallel.dp={parallel.dp} * " if parallel.dp else ""
        raise UserError(
            f"{want}parallel.tp={parallel.tp} * pp={parallel.pp} * cp={parallel.cp} does not fit "
            f"{nodes.train} nodes of {nodes.node.gpus} GPUs: change the layout or the nodes"
        )
    return dp


def server_memory(config: TrainConfig, shape: ModelShape, node: NodeType) -> ServerMemory:
    """Return what rollout.gpu_memory_utilization of a GPU goes to."""
    rollout = config.rollout
    value_bytes = DTYPE_BYTES[rollout.dtype or config.model.dtype]
    total = int(rollout.gpu_memory_utilization * node.gpu_memory)
    weights = num_parameters(shape) * value_bytes // rollout.tensor_parallel
    # With more GPUs than key/value heads, vLLM repeats them.
    shards = min(rollout.tensor_parallel, shape.num_kv_heads)
    of_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * value_bytes
    return ServerMemory(
        total=total,
        weights=weights,
        engine=ENGINE,
        kv_cache=total - weights - ENGINE,
        kv_bytes_per_token=of_token // shards,
        response_tokens=config.data.max_prompt_tokens + rollout.max_response_tokens,
        max_num_seqs=rollout.max_num_seqs,
    )


def server_problems(
    config: TrainConfig, shape: ModelShape, server: ServerMemory, gpus: int
) -> list[str]:
    """Say what keeps a server from starting, or from holding a single response."""
    rollout, tp = config.rollout, config.rollout.tensor_parallel
    heads, groups = shape.num_heads, shape.num_kv_heads
    fits = [
        n for n in range(1, gpus + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)
    ]
    if tp <= gpus and tp not in fits:
        return [
            f"rollout.tensor_parallel={tp} does not divide the model's {heads} heads and {groups} "
            f"key/value heads, so vLLM does not start: use {', '.join(map(str, fits))}"
        ]
    change = (
        f"raise rollout.tensor_parallel={tp} or "
        f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}"
    )
    if tp > gpus:
        return [
            f"rollout.tensor_parallel={tp} is more than the {gpus} GPUs of a node: lower it to "
            f"{fits[-1]} or less"
        ]
    if rollout.placement == "colocated" and rollout.servers * tp > gpus:
        return [
            f"rollout.servers={rollout.servers} * tensor_parallel={tp} = {rollout.servers * tp} "
            f"GPUs do not fit a node of {gpus}: lower rollout.servers to {gpus // tp}, or "
            "tensor_parallel"
        ]
    if server.kv_cache <= 0:
        need = (server.weights + server.engine) / GIB
        return [
            f"a server needs {need:.1f} GiB of each GPU before its KV cache, and has "
            f"{server.total / GIB:.1f}: {change}"
        ]
    if not server.whole_responses:
        return [
            f"a server's KV cache holds {server.kv_tokens} tokens, less than one response of "
            f"{server.response_tokens}: {change}, or lower rollout.max_response_tokens"
        ]
    return []

"""What a vLLM server has of a GPU: its share of the weights, and the KV cache that is left."""

from __future__ import annotations

from dataclasses import dataclass

from megafork.config import TrainConfig
from megafork.model.shape import ModelShape
from megafork.plan.efficiency import Efficiency
from megafork.plan.nodes import GIB, NodeType
from megafork.plan.work import kv_bytes_per_token, num_parameters

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ServerMemory:
    """Of one GPU of a server, in bytes; responses of the whole server."""

    total: int
    """what rollout.gpu_memory_utilization grants it"""
    weights: int
    engine: int
    """activations, CUDA graphs, NCCL, the CUDA context: an allowance, not measured"""
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
        """Responses of full length that the cache holds at once."""
        return self.kv_tokens // self.response_tokens


def server_memory(config: TrainConfig, shape: ModelShape, node: NodeType) -> ServerMemory:
    rollout = config.rollout
    value_bytes = DTYPE_BYTES[rollout.dtype or config.model.dtype]
    total = int(rollout.gpu_memory_utilization * node.gpu_memory)
    weights = num_parameters(shape) * value_bytes // rollout.tensor_parallel
    engine = int(Efficiency().engine_reserve_gib * GIB)
    # With more GPUs than key/value heads, vLLM repeats them.
    shards = min(rollout.tensor_parallel, shape.num_kv_heads)
    return ServerMemory(
        total=total,
        weights=weights,
        engine=engine,
        kv_cache=total - weights - engine,
        kv_bytes_per_token=kv_bytes_per_token(shape, value_bytes) // shards,
        response_tokens=config.data.max_prompt_tokens + rollout.max_response_tokens,
        max_num_seqs=rollout.max_num_seqs,
    )


def server_problems(
    config: TrainConfig, shape: ModelShape, server: ServerMemory, gpus: int
) -> list[str]:
    """What keeps a server from starting, or from holding a single response."""
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
        return [f"rollout.tensor_parallel={tp} is more than the {gpus} GPUs of a node: lower it"]
    if rollout.placement == "colocated" and rollout.servers * tp > gpus:
        return [
            f"rollout.servers={rollout.servers} * tensor_parallel={tp} GPUs do not fit a node of "
            f"{gpus}: lower one of them"
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

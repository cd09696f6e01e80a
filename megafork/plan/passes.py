"""Seconds and bytes of the trainer's passes over one mini-batch, from the run's own packing.

The rank with the most tokens decides. Ranks lie as megatron lays them: tp, then cp, then dp, then
pp; a group that does not fit into one node goes at the network's rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megafork.config import TrainConfig
from megafork.data.packing import plan_micro_batches
from megafork.model.shape import ModelShape
from megafork.parallel.zigzag import Zigzag
from megafork.plan.efficiency import Efficiency
from megafork.plan.nodes import NodeType
from megafork.plan.work import (
    Lengths,
    attention_flops,
    head_flops,
    layer_parameters,
    matrix_flops,
    num_parameters,
)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_GRADIENT_BYTES = 4
_OPTIMIZER_TRAFFIC = 28
"""bytes read and written for a parameter: gradient, main copy and two moments in float32, read; the
last three written. The weight itself comes on top."""


@dataclass(frozen=True)
class Kind:
    """How often a pass goes through what one forward pass goes through once."""

    matrices: float
    attention: float
    head: float
    """of the rows that it runs on"""
    gathers: float
    """of activations [tokens, hidden] over the tensor-parallel ranks, that nothing hides; a
    reduction is one, an all-reduce two"""
    hidden_gathers: float
    """those that a product hides"""
    rings: float
    """of keys and values over the context-parallel ranks"""
    crossings: int
    """of a pipeline boundary"""


FORWARD = Kind(1, 1, 1, 4, 0, 1, 1)


def update_kind(recompute: str, *, sequence_parallel: bool) -> Kind:
    """Forward and backward. Backward has two products for one of forward's; a causal attention
    kernel five for two; the head computes its logits once more and has no third for free."""
    full, any_kind = recompute == "full", recompute != "none"
    return Kind(
        matrices=3 + full,
        attention=3.5 + any_kind,
        head=4,
        gathers=8 + 4 * full,
        hidden_gathers=2 * sequence_parallel,  # the inputs, for the weights' gradients
        rings=3 + any_kind,
        crossings=2,
    )


@dataclass
class PassTime:
    seconds: float = 0.0
    waiting: dict[str, float] = field(default_factory=dict)
    wire_bytes: dict[str, float] = field(default_factory=dict)


class Trainer:
    """The trainer's ranks and the mini-batch that they have in front of them."""

    def __init__(
        self,
        config: TrainConfig,
        shape: ModelShape,
        node: NodeType,
        dp: int,
        lengths: Lengths,
        efficiency: Efficiency,
    ) -> None:
        self.parallel, self.shape, self.node, self.dp = config.parallel, shape, node, dp
        self.efficiency = efficiency
        self.value_bytes = DTYPE_BYTES[config.model.dtype]
        parallel = config.parallel
        count = config.training.prompts_per_minibatch * config.rollout.group_size
        responses = lengths.responses(count)
        part = Zigzag(0, parallel.cp, parallel.tp if parallel.sequence_parallel else 1)
        fed = [part.padded(lengths.prompt + length - 1) for length in responses]
        plan = plan_micro_batches(
            fed,
            dp_size=dp,
            token_budget=config.training.micro_batch_tokens,
            cp_size=parallel.cp,
            count_multiple=parallel.pp if parallel.vpp > 1 else 1,
        )
        ranks = [[s for micro_batch in rank for s in micro_batch] for rank in plan]
        heaviest = max(ranks, key=lambda rank: sum(fed[s] for s in rank))
        self.num_micro_batches = len(plan[0])
        self.tokens = sum(fed[s] for s in heaviest)
        self.squares = sum(fed[s] ** 2 for s in heaviest)
        self.rows = sum(responses[s] for s in heaviest)
        self.all_tokens = sum(fed)

    def run(self, kind: Kind, head_share: float) -> PassTime:
        """One pass over the mini-batch. head_share: of the response tokens, that the head sees."""
        shape, node, efficiency, parallel = self.shape, self.node, self.efficiency, self.parallel
        split = parallel.tp * parallel.cp
        matrices = kind.matrices * matrix_flops(shape, self.tokens) / split
        matrices /= node.flops * efficiency.matrices
        attention = kind.attention * attention_flops(shape, self.squares) / split
        attention /= node.flops * efficiency.attention
        head = kind.head * head_flops(shape, self.rows * head_share) / split
        head /= node.flops * efficiency.head
        activation = self.tokens / parallel.cp * shape.hidden_size * self.value_bytes
        gather = activation * (parallel.tp - 1) / parallel.tp / self._rate(parallel.tp)
        values = 2 * shape.num_kv_heads * shape.head_dim * self.value_bytes
        ring = self.tokens / split * (parallel.cp - 1) * values / self._rate(split)
        of_layer = {
            "tensor_parallel": kind.gathers * gather,
            "context_parallel": max(0.0, kind.rings * ring - attention),
        }
        seconds, layers = max(
            (layers * (matrices + attention + sum(of_layer.values())) + head * is_last, layers)
            for layers, is_last in self._ranks()
        )
        waiting = {name: layers * value for name, value in of_layer.items()}
        if parallel.pp > 1:
            sent = activation / (parallel.tp if parallel.sequence_parallel else 1)
            crossing = sent / self._rate(self.dp * split * parallel.pp)
            waiting["pipeline"] = kind.crossings * parallel.vpp * crossing
            seconds += waiting["pipeline"]
            each = seconds / self.num_micro_batches
            waiting["bubble"] = each * (parallel.pp - 1) / parallel.vpp
            seconds += waiting["bubble"]
        return PassTime(seconds, waiting, self._sent(kind))

    def reduce_and_step(self, backward_seconds: float) -> PassTime:
        """Gradients reduced, AdamW's step on each rank's share, weights gathered: once an update.

        backward_seconds: of the last micro-batch, behind which the reduction hides.
        """
        parallel, rate = self.parallel, self._rate(self.parallel.tp * self.parallel.cp * self.dp)
        parameters, sharers = self._parameters_of_rank(), parallel.cp * self.dp
        others = parameters * (sharers - 1) / sharers
        reduce = max(0.0, others * _GRADIENT_BYTES / rate - backward_seconds)
        gather = others * self.value_bytes / rate
        traffic = parameters / sharers * (_OPTIMIZER_TRAFFIC + self.value_bytes)
        step = traffic / (self.node.hbm * self.efficiency.hbm)
        total = num_parameters(self.shape) * (sharers - 1) * (_GRADIENT_BYTES + self.value_bytes)
        waiting = {"data_parallel": reduce + gather}
        return PassTime(step + reduce + gather, waiting, {"data_parallel": total})

    def state_bytes(self) -> float:
        """Weights and optimizer's state of a rank: what moves to the host and back.

        In float32 the weights are their own main copy.
        """
        parameters, sharers = self._parameters_of_rank(), self.parallel.cp * self.dp
        state = 8 if self.value_bytes == 4 else 12
        return parameters * self.value_bytes + state * parameters / sharers

    def _sent(self, kind: Kind) -> dict[str, float]:
        """By all ranks together."""
        shape, parallel = self.shape, self.parallel
        activations = self.all_tokens * shape.hidden_size * self.value_bytes
        values = 2 * shape.num_kv_heads * shape.head_dim * self.value_bytes * self.all_tokens
        gathers = kind.gathers + kind.hidden_gathers
        copies = 1 if parallel.sequence_parallel else parallel.tp
        return {
            "tensor_parallel": gathers * (parallel.tp - 1) * activations * shape.num_layers,
            "context_parallel": kind.rings * (parallel.cp - 1) * values * shape.num_layers,
            "pipeline": kind.crossings * (parallel.num_stages - 1) * copies * activations,
        }

    def _ranks(self) -> list[tuple[int, bool]]:
        """Of each pipeline rank: its layers, and whether it has the head."""
        sizes = [len(layers) for layers in self.shape.stage_layers(self.parallel)]
        pp = self.parallel.pp
        return [(sum(sizes[rank::pp]), rank == pp - 1) for rank in range(pp)]

    def _parameters_of_rank(self) -> float:
        layers = max(layers for layers, _ in self._ranks())
        vocabulary = self.shape.vocab_size * self.shape.hidden_size
        if self.parallel.pp == 1 and not self.shape.tied_embeddings:
            vocabulary *= 2  # embedding and head on the same rank
        return (layers * layer_parameters(self.shape) + vocabulary) / self.parallel.tp

    def _rate(self, extent: int) -> float:
        """bytes/s of a group whose ranks lie within `extent` neighbours."""
        if extent <= self.node.gpus:
            return self.node.nvlink * self.efficiency.nvlink
        return self.node.network * self.efficiency.network

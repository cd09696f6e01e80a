"""The parts of the memory that a run needs: of a GPU, and of a host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageMemory:
    """Of one GPU at one pipeline rank, in bytes."""

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
    """instead of activations: whole tensors and buckets of a weight sync, the reference's swap"""
    bucket: int
    """of a weight sync, the largest; a server that takes it through local memory copies it"""
    reserve: int

    @property
    def static(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.critic

    @property
    def put_away(self) -> int:
        """What moves to the host for a server's turn: all but gradients, which are dropped."""
        own = self.parameters + self.optimizer
        return own + self.critic * own // (own + self.gradients)

    @property
    def training(self) -> int:
        """Tensors at the peak of an update."""
        return self.static + max(self.activations + self.passing, self.reduction)

    @property
    def total(self) -> int:
        return max(self.training, self.static + self.transfer) + self.reserve


@dataclass(frozen=True)
class HostMemory:
    """Of a node that trains, in bytes."""

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

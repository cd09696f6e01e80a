"""Seconds of a step and bytes on the wire, from rooflines with stated efficiencies.

Nothing here is measured: rates are data sheets' times the efficiencies below, which are round
numbers in the range that well-kept stacks report. Every assumption is in StepTime.assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from megafork.config.section import Fraction, PositiveFloat, Section


class Efficiency(Section):
    """What is reached of a node's rates."""

    matrices: Fraction = Field(
        0.5, description="of bf16 peak: a layer's matrices with all that is elementwise around them"
    )
    attention: Fraction = Field(0.4, description="of bf16 peak: causal attention over packs")
    head: Fraction = Field(0.25, description="of bf16 peak: log-probabilities and entropies")
    hbm: Fraction = Field(0.8, description="of GPU memory's rate")
    nvlink: Fraction = Field(0.75, description="of NVLink's rate, in collectives")
    network: Fraction = Field(0.75, description="of the network's rate, in collectives")
    host_link: Fraction = Field(0.7, description="of the rate between host and GPU")
    engine_iteration_s: PositiveFloat = Field(
        0.004, description="seconds of a decoding step beside memory and products"
    )
    all_reduce_s: PositiveFloat = Field(
        1e-5, description="seconds of latency of an all-reduce in decoding (two in each layer)"
    )


@dataclass(frozen=True)
class StepTime:
    """One step (rollout batch) in the steady state."""

    seconds: dict[str, float]
    """by phase: generate, score, update, optimizer, sync; reference, critic, move where they are.
    What a phase waits for communication is part of it"""
    waiting: dict[str, float]
    """of the phases' seconds: pipeline bubbles and communication that nothing hides, by kind"""
    wire_bytes: dict[str, float]
    """bytes that all GPUs together send in a step, by kind; sync: each weight once"""
    total: float
    """seconds of the step; less than the phases' sum where generation overlaps with training"""
    num_gpus: int
    """trainer's and servers'"""
    num_tokens: float
    """prompts and responses that are trained on"""
    assumptions: list[str]

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.num_tokens / self.total / self.num_gpus

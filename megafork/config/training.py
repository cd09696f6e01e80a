"""Updates, and what a run leaves on disk."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megafork.config.section import NonNegative, Positive, PositiveFloat, Section


class TrainingConfig(Section):
    steps: Positive = Field(description="rollout batches to train on")
    prompts_per_minibatch: Positive = Field(32, description="groups of one optimizer step")
    micro_batch_tokens: Positive = Field(
        32768, description="tokens of one packed micro-batch on one rank (a sequence is on cp)"
    )
    lr: PositiveFloat = Field(1e-6, description="peak learning rate")
    warmup_steps: NonNegative = Field(10, description="optimizer steps of linear warm-up")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="AdamW weight decay, off for norms"
    )
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="Adam beta 1")
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.999, description="Adam beta 2")
    adam_eps: PositiveFloat = Field(1e-8, description="Adam epsilon")
    grad_clip: PositiveFloat = Field(1.0, description="bound of the global gradient norm")
    spike_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        10.0,
        description="an update whose |loss| (of 1 at least) or gradient norm is this many times "
        "the largest of the last 64 is skipped; 16 updates have to come first",
    )
    max_skipped: Positive = Field(
        3, description="updates skipped in a row (NaN, infinity, spike) that end the run"
    )
    seed: int = Field(0, description="seed of mini-batches and of random selection")


class LoggingConfig(Section):
    writers: list[str] = Field(
        [],
        description="where the metrics of each step go beside metrics.jsonl, each as MODULE:CLASS",
    )


class CheckpointConfig(Section):
    every: NonNegative = Field(
        10, description="steps between checkpoints that a run resumes from (0: after the last only)"
    )
    keep_last: Positive = Field(2, description="newest checkpoints that are kept")
    keep_every: Positive | None = Field(
        None, description="checkpoints of steps that are a multiple of this are kept too"
    )
    asynchronous: bool = Field(
        True, description="write while the next steps are computed, from a forked copy"
    )


class RunConfig(Section):
    dir: str = Field(description="folder of the run's outputs; must not hold another run")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")
    samples_every: NonNegative = Field(
        10,
        description="steps between those of which responses are kept with their entropies, beside "
        "the first and the last (0: none)",
    )
    samples: Positive = Field(4, description="responses that are kept of such a step")
    silence_s: float = Field(
        60.0,
        ge=5.0,
        description="seconds without a word after which controller or agent count as hung",
    )

"""Generation, rewards, and what keeps the server like the policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megafork.answers.places import Place
from megafork.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section
from megafork.config.server import ServerConfig
from megafork.errors import UserError


class RolloutConfig(ServerConfig):
    placement: Literal["disaggregated", "colocated"] = Field(
        "disaggregated",
        description="servers and trainer at the same time, each with memory of its own; or in "
        "turns on the same GPUs, each putting its memory away for the other",
    )
    prompts_per_step: Positive = Field(512, description="groups of one rollout batch")
    group_size: Positive = Field(16, description="responses for each prompt")
    dynamic_sampling: bool = Field(
        True, description="replace groups whose responses are all right or all wrong (DAPO)"
    )
    max_sampling_rounds: Positive = Field(
        10, description="stop when a batch is still not full after this many rounds of prompts"
    )
    surplus: Literal["carry", "drop"] = Field(
        "carry",
        description="admissible groups beyond the batch: into the next one, if max_policy_lag "
        "allows it, or dropped",
    )
    tail: Literal["wait", "abort", "carry"] = Field(
        "wait",
        description="responses still being generated when the batch is full: waited for; ended and "
        "lost, which favours short ones; or left to go on, for a later batch (one version of "
        "max_policy_lag is then theirs, and one batch less is generated ahead)",
    )
    oversampling: Annotated[float, Field(ge=1.0)] = Field(
        1.0, description="prompts asked for, in multiples of what is likely to fill the batch"
    )
    max_policy_lag: NonNegative = Field(
        0,
        description="policy updates (in steps) that a token may be behind the policy that trains "
        "on it. 0: strictly on-policy; n: the next n batches are generated during training",
    )
    in_flight_update: bool = Field(
        True,
        description="new weights go to the server in the middle of responses; false: they wait for "
        "those that it is generating",
    )
    seeded: bool = Field(
        False, description="a seed for every request: repeatable responses, slower generation"
    )
    max_restarts: NonNegative = Field(
        3, description="how often a server that died is replaced before a step goes on"
    )


class RewardConfig(Section):
    verifier: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="maths, countdown, exact, reasoning-gym:TASK, or a function of (prompt, "
        "response, answer) -> reward as MODULE:FUNCTION; or a list of them"
    )
    answer_from: Place | Annotated[list[Place], Field(min_length=1)] | None = Field(
        None,
        description="where the answer of a response stands, for maths and exact: boxed, "
        "answer_line (Answer: ...), hash (#### ...), last_number, or a list of them in order; "
        "unset: boxed, and for exact the whole response",
    )
    weights: list[float] | None = Field(
        None,
        description="of a list of verifiers: the reward is the weighted sum; accuracy is that of "
        "the first verifier alone",
    )
    workers: Positive | None = Field(
        None,
        description="processes that verifiers run in, on each node; unset: its cores, but 32 at "
        "most",
    )
    timeout_s: PositiveFloat = Field(
        10.0, description="seconds for one response; then its worker is killed, and it scores 0"
    )
    memory_mib: Annotated[int, Field(ge=64, strict=True)] = Field(
        2048, description="address space of one worker; what needs more scores 0"
    )
    environment: list[str] = Field(
        [],
        description="variables that verifiers see beside those that can hold no key: their names",
    )
    max_failed_fraction: Fraction = Field(
        0.5,
        description="the run ends when verifiers give no verdict on more than this share of a "
        "batch's responses, or on all of them",
    )
    accuracy_at: float = Field(
        1.0, description="a response is right when the (first) verifier's score reaches this"
    )
    overlong_buffer_tokens: Positive | None = Field(
        None,
        description="soft overlong punishment: the reward falls over the last this many tokens "
        "before rollout.max_response_tokens; unset: off",
    )
    overlong_penalty: PositiveFloat = Field(
        1.0, description="what the reward has lost at rollout.max_response_tokens"
    )

    @property
    def verifiers(self) -> list[str]:
        return [self.verifier] if isinstance(self.verifier, str) else self.verifier

    @property
    def places(self) -> list[Place] | None:
        """`answer_from` as a list; None: unset."""
        return [self.answer_from] if isinstance(self.answer_from, str) else self.answer_from

    def check(self) -> None:
        """Raises UserError when the settings are not those of the verifiers."""
        names, weights = self.verifiers, self.weights
        if self.answer_from is not None and not {"maths", "exact"} & set(names):
            raise UserError(
                f"reward.answer_from={', '.join(self.places or [])} is for the verifiers maths and "
                f"exact, not for reward.verifier={', '.join(names)}: leave it unset"
            )
        if weights is None and len(names) > 1:
            raise UserError(
                f"reward.verifier names {len(names)} verifiers but reward.weights is unset: give "
                f"as many weights, as in reward.weights={[1.0] + [0.5] * (len(names) - 1)}"
            )
        if weights is not None and len(weights) != len(names):
            raise UserError(
                f"reward.weights={weights} has {len(weights)} weights for the {len(names)} of "
                f"reward.verifier={', '.join(names)}: give one for each"
            )


class SyncConfig(Section):
    transport: Literal["auto", "broadcast", "local"] = Field(
        "auto",
        description="how weights reach the server: broadcast (NCCL or gloo), or through memory "
        "that it shares with a trainer on the same machine; auto: local with "
        "rollout.placement=colocated on one machine, else broadcast",
    )
    bucket_mib: Positive = Field(
        256, description="weights travel in buckets of this size, of which two are there at a time"
    )
    check_every: NonNegative = Field(
        10, description="steps between comparisons of trainer and server (0: the first push only)"
    )
    check_prompts: Positive = Field(8, description="prompts of one comparison")
    max_mean_difference: PositiveFloat | None = Field(
        None, description="bound of mean |log-probability difference|; unset: by dtype"
    )
    max_k3: PositiveFloat | None = Field(None, description="bound of the k3 KL; unset: by dtype")
    max_bias: PositiveFloat | None = Field(
        None, description="bound of the signed mean difference; unset: by dtype"
    )
    max_slope: PositiveFloat | None = Field(
        None,
        description="bound of the difference's slope over the log-probability; unset: by dtype",
    )
    max_noise_ratio: PositiveFloat | None = Field(
        None,
        description="bound of the server's mean square error over that of bfloat16 itself; "
        "unset: 4",
    )
    timeout_s: PositiveFloat = Field(300.0, description="seconds for one weight push")


class EvalConfig(Section):
    every: NonNegative = Field(0, description="steps between evaluations (0: start and end only)")
    prompts: Positive | None = Field(None, description="held-out prompts; unset: all of them")
    samples: Positive = Field(1, description="responses for each held-out prompt")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature of the evaluation")

"""`megafork generate` and `megafork eval`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megafork.config.data import BenchmarkConfig
from megafork.config.model import TokenizerConfig
from megafork.config.rollout import RewardConfig
from megafork.config.section import Fraction, Positive, Section
from megafork.config.server import ServerConfig
from megafork.errors import UserError


class ServedModelConfig(Section):
    path: str = Field(description="HF folder, a run's folder, or a run's checkpoints/step_000010")


class GenerationConfig(ServerConfig):
    """A server of one's own, and sampling that may be cut, as training's never is."""

    samples: Positive = Field(1, description="responses for each prompt")
    top_p: Fraction = Field(
        1.0,
        description="sample from the likeliest tokens that sum to this (and from their "
        "log-probabilities)",
    )
    top_k: Positive | None = Field(None, description="sample from this many tokens; unset: all")
    seed: int | None = Field(
        None, description="responses repeat with it, and take longer; unset: they do not"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the server; unset: the folder's, or bfloat16"
    )
    gpu_memory_utilization: Fraction = Field(0.9, description="GPU memory for the server")


class GenerateConfig(Section):
    """The overrides that `megafork generate` takes."""

    model: ServedModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: BenchmarkConfig = BenchmarkConfig()
    rollout: GenerationConfig = GenerationConfig()

    def check(self) -> None:
        """Raise UserError for settings that contradict each other."""
        self.data.check(needs_answers=False)


class MetricsConfig(Section):
    extract: Literal["auto", "boxed", "text"] = Field(
        "auto",
        description="what votes in maj@k: boxed, the answer where reward.answer_from looks for it "
        "(unset: the last \\boxed{...}); text, the whole response; auto: the answer, or the whole "
        "response where it has none and ended",
    )


class EvaluateConfig(GenerateConfig):
    """The overrides that `megafork eval` takes."""

    reward: RewardConfig
    metrics: MetricsConfig = MetricsConfig()

    def check(self) -> None:
        """Raise UserError for settings that contradict each other."""
        self.data.check(needs_answers=True)
        self.reward.check()
        if self.reward.overlong_buffer_tokens is not None:
            raise UserError(
                f"reward.overlong_buffer_tokens={self.reward.overlong_buffer_tokens} shapes the "
                "rewards of training; an evaluation reports what the verifier says: leave it unset"
            )

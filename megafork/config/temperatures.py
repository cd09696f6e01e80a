"""`megafork analyze temperatures`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megafork.config.model import ModelConfig, TokenizerConfig
from megafork.config.rollout import DataConfig, RewardConfig, RolloutConfig
from megafork.config.section import Section
from megafork.errors import UserError

Temperatures = tuple[Annotated[float, Field(ge=0.0)], ...]


class SweepConfig(Section):
    threshold: Annotated[float, Field(ge=0.0)] = Field(
        0.672, description="nats; tokens of higher entropy have the temperature `above`"
    )
    above: Temperatures = Field(
        (0.6, 0.8, 1.0, 1.2, 1.4),
        description="temperatures above the threshold, each with 1 below it; 0 is greedy",
    )
    below: Temperatures = Field(
        (0.6, 0.8, 1.0, 1.2, 1.4),
        description="temperatures below the threshold, each with 1 above it; 0 is greedy",
    )


class TemperaturesConfig(Section):
    """The overrides that `megafork analyze temperatures` takes."""

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    sweep: SweepConfig = SweepConfig()

    def check(self) -> None:
        """Raises UserError for settings that this command cannot keep."""
        if self.rollout.temperature != 1.0:
            raise UserError(
                f"rollout.temperature={self.rollout.temperature:g} has no meaning here: set "
                "sweep.above and sweep.below"
            )
        if self.rollout.url is not None:
            raise UserError(
                f"rollout.url={self.rollout.url}: a server that runs already knows one temperature "
                "for all tokens; leave it unset, so that one is started that knows two"
            )

"""The critic: a second model that learns what a response will be worth (advantages by GAE)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megafork.config.section import Fraction, NonNegative, PositiveFloat, Section


class CriticConfig(Section):
    path: str | None = Field(
        None,
        description="HF folder that the critic starts from, with its value head if it has one "
        "(score.weight); unset: model.path",
    )
    lr: PositiveFloat = Field(1e-5, description="peak learning rate of the critic")
    warmup_steps: NonNegative = Field(10, description="its optimizer steps of linear warm-up")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="its AdamW weight decay, off for norms"
    )
    grad_clip: PositiveFloat = Field(1.0, description="bound of its global gradient norm")
    gamma: Fraction = Field(1.0, description="discount of each token")
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0,
        description="GAE's lambda; 1: the reward minus the value, without the critic's bias, and "
        "a reward that reaches the first of thousands of tokens (0.95 ** 100 is 0.006)",
    )
    clip_value: PositiveFloat | None = Field(
        None,
        description="values are clipped to within this of those before the rollout batch's first "
        "update (PPO, 0.2); unset: never",
    )
    tokens: Literal["all", "forking"] = Field(
        "all",
        description="tokens whose values are learnt, and whose number the loss is divided by: all "
        "loss tokens, or the selected ones",
    )
    alone_steps: NonNegative = Field(
        0, description="rollout batches at the start of a run on which the critic learns alone"
    )

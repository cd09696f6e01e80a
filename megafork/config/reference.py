"""Terms of the loss that hold the policy near a reference or keep its entropy up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megafork.config.section import Section

Coefficient = Annotated[float, Field(ge=0.0)]


class KLConfig(Section):
    """Off in DAPO and in the paper; the defaults are GRPO's."""

    coefficient: Coefficient = Field(
        0.0, description="of the KL to the reference policy in the loss (0: no such term)"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="x = log pi - log ref; k2: x^2 / 2; k3: exp(-x) - 1 + x (GRPO); k1: the value "
        "x with the gradient of k2, as a penalty of the token's reward has it",
    )
    ratio: bool = Field(
        False,
        description="multiply the estimate by pi / pi_old (DeepSeek-V3.2, TRL's default): with "
        "every estimator the gradient is then that of KL(pi || ref), at later updates too",
    )
    tokens: Literal["forking", "all"] = Field(
        "all", description="which tokens have the term: the selected ones, or the whole loss mask"
    )
    reference: str | None = Field(
        None, description="HF folder of the reference; unset: model.path, the initial policy"
    )


class EntropyBonusConfig(Section):
    """Off in DAPO and in the paper; `tokens` defaults to TRL's reach under its own mask."""

    coefficient: Coefficient = Field(
        0.0, description="of the mean entropy that the loss is lowered by (0: no such term)"
    )
    tokens: Literal["forking", "all"] = Field(
        "forking", description="whose entropy: the selected tokens', or the whole loss mask's"
    )

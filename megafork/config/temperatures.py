"""`megafork analyze temperatures`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megafork.config.evaluate import EvaluateConfig
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


class TemperaturesConfig(EvaluateConfig):
    """The overrides that `megafork analyze temperatures` takes."""

    sweep: SweepConfig = SweepConfig()

    def check(self) -> None:
        """Raise UserError for settings that contradict each other."""
        super().check()
        rollout = self.rollout
        for key, value, neutral in (
            ("temperature", rollout.temperature, 1.0),
            ("top_p", rollout.top_p, 1.0),
            ("top_k", rollout.top_k, None),
        ):
            if value != neutral:
                raise UserError(
                    f"rollout.{key}={value} would change the distribution that sweep.above and "
                    "sweep.below set: leave it unset"
                )
        if rollout.url is not None:
            raise UserError(
                f"rollout.url={rollout.url}: a server that runs already knows one temperature for "
                "all tokens; leave it unset, so that one is started that knows two"
            )

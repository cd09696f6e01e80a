"""The objective, its correction, and the selection of forking tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megafork.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section

OBJECTIVES = {
    "ppo": "megafork.algorithms.objectives:ppo",
    "gspo": "megafork.algorithms.objectives:gspo",
    "cispo": "megafork.algorithms.objectives:cispo",
}
"""Objectives by name (see `megafork.plugins.load_plugin`)"""

ADVANTAGES = {"group": "megafork.algorithms.advantages:group_advantages", "gae": ""}
"""Advantages by name; "gae" is the critic's"""

SELECTIONS = {"top": "", "bottom": "", "random": "", "all": ""}
"""What forking.select takes besides a plug-in's name"""

CLIPS = {"ppo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
"""(clip_low, clip_high) of an objective where they are not set: DAPO's; those of GSPO's paper; no
bound below (CISPO's paper) and 5 above (arXiv 2510.13786)."""

SMALLEST_OF_TOKENS, LARGEST_OF_SEQUENCES = 1e-3, 0.1
"""Clips of one token's ratio are not below, those of a response's mean ratio not above."""


def _clip_low(settings: dict[str, Any]) -> float:
    return _clips(settings["objective"])[0]


def _clip_high(settings: dict[str, Any]) -> float:
    return _clips(settings["objective"])[1]


def _clips(objective: str) -> tuple[float, float]:
    """Return the default clips; those of ppo for an objective of one's own."""
    return CLIPS[objective] if objective in CLIPS else CLIPS["ppo"]


class AlgorithmConfig(Section):
    objective: str = Field(
        "ppo",
        description="what is clipped: each token's ratio (ppo: GRPO, DAPO); its sequence's (gspo); "
        "the token's as a constant factor of its log-probability (cispo); or MODULE:FUNCTION",
    )
    old_logprobs: Literal["trainer", "engine"] = Field(
        "trainer",
        description="the ratio's denominator: scored by the trainer before the batch's first "
        "update; or what the engine sampled with, which makes the ratio an importance weight and "
        "takes no scoring pass where no entropies are needed",
    )
    clip_low: Fraction = Field(
        default_factory=_clip_low,
        description="epsilon below 1 of the clipped ratio; unset: 0.2 (ppo), 3e-4 (gspo), 1, which "
        "is no bound (cispo)",
    )
    clip_high: PositiveFloat = Field(
        default_factory=_clip_high,
        description="epsilon above 1; unset: 0.28, DAPO's clip-higher (ppo), 4e-4 (gspo), 4 "
        "(cispo)",
    )
    clip_dual: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="bound of the ratio where the advantage is negative; unset: none"
    )
    denominator: Literal["tokens", "sequence_tokens", "max_response_tokens"] = Field(
        "tokens",
        description="what the sum over tokens is divided by: the mini-batch's tokens (DAPO); each "
        "sequence's own, then the number of sequences (GRPO, GSPO); rollout.max_response_tokens "
        "times the number of sequences (Dr. GRPO)",
    )
    advantages: str = Field(
        "group",
        description="a response's reward against its group's (group: GRPO); GAE with a critic "
        "(gae: PPO); or MODULE:FUNCTION",
    )
    credit: list[str] = Field(
        [],
        description="rules that weigh or leave out tokens after the selection, each as "
        "MODULE:FUNCTION; weights are multiplied",
    )
    normalize_advantage: bool = Field(
        True,
        description="group: divide the centred rewards of a group by their standard deviation; "
        "gae: whiten the advantages over the loss tokens of the rollout batch",
    )
    overlong_filtering: bool = Field(
        True, description="responses cut at max_response_tokens take no part in the loss"
    )

    @property
    def uses_critic(self) -> bool:
        return self.advantages == "gae"


class MismatchConfig(Section):
    correction: Literal["none", "truncate", "mask"] = Field(
        "none",
        description="factor of a token's loss for pi_old / pi_engine: 1; the ratio, at most "
        "max_weight; the ratio, or 0 outside min_weight .. max_weight",
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="whose ratio: the token's, or its whole response's (the product)"
    )
    max_weight: Annotated[float, Field(ge=1.0)] = Field(
        2.0, description="the largest ratio that is used as it is"
    )
    min_weight: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="the smallest ratio that is not masked; unset: 1 / max_weight"
    )
    large_difference: PositiveFloat = Field(
        0.1, description="nats; mismatch/large_fraction counts the tokens that differ by more"
    )


class ForkingConfig(Section):
    select: str = Field(
        "top",
        description="which response tokens carry the policy gradient: top, bottom, random or all; "
        "or MODULE:FUNCTION, whose scores stand for the entropies",
    )
    rho: Fraction = Field(0.2, description="fraction of the tokens, by entropy")
    rho_end: Fraction | None = Field(
        None, description="rho from step rho_steps on, approached linearly; unset: rho throughout"
    )
    rho_steps: Annotated[int, Field(ge=2, strict=True)] | None = Field(
        None, description="the first step whose fraction is rho_end"
    )
    population: Literal["loss", "response"] = Field(
        "loss",
        description="the tokens that rho is a fraction of: those of the loss mask, or those of "
        "responses that algorithm.overlong_filtering takes out of it too",
    )
    scope: Literal["minibatch", "batch", "sequence"] = Field(
        "minibatch",
        description="the tokens over which a threshold is taken: one optimizer step's, the whole "
        "rollout batch's, or each response's own",
    )
    entropy_of: Literal["old", "current"] = Field(
        "old",
        description="whose entropies: of the policy before the first update of the batch, or just "
        "before each update (one more forward pass)",
    )
    ties: Literal["keep", "hash"] = Field(
        "keep",
        description="tokens whose entropy has the threshold's bits: all kept, or exactly as many "
        "as rho asks for",
    )
    entropy_temperature: PositiveFloat | None = Field(
        None, description="temperature of the entropy; unset: the sampling temperature"
    )
    compare_every: NonNegative = Field(
        0,
        description="steps between comparisons of the selection with the one that the reference "
        "policy's entropies make (forking/overlap_initial; 0: none)",
    )
    report_tokens: NonNegative = Field(
        20, description="tokens of each list of a step in forking_tokens.jsonl (0: no file)"
    )
    report_min_count: Positive = Field(
        50, description="how often a token has to occur in a step for its mean entropy's list"
    )

    @property
    def by_entropy(self) -> bool:
        return self.select in ("top", "bottom")

    @property
    def by_plugin(self) -> bool:
        return self.select not in SELECTIONS

    def rho_at(self, step: int) -> float:
        """The fraction of a step, counted from 1; a function of the step alone."""
        if self.rho_end is None or self.rho_steps is None:
            return self.rho
        if step >= self.rho_steps:
            return self.rho_end
        share = (step - 1) / (self.rho_steps - 1)
        # 0.15, not 0.15000000000000002, of which the threshold would take one token more.
        return round(self.rho + (self.rho_end - self.rho) * share, 12)

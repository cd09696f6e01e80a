"""The sections of what the ranks do: model, layout, algorithm, selection, training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, strict=True)]
NonNegative = Annotated[int, Field(ge=0, strict=True)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A frozen table of settings; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    path: str = Field(
        description="HF folder of the policy (config.json and safetensors), or owner/name on the "
        "hub"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the trained weights and activations"
    )
    recompute: Literal["none", "full", "selective"] = Field(
        "none", description="activation recomputation: every layer, core attention only, or none"
    )
    float32_head: bool = Field(
        False, description="keep an untied head's weight in float32 where dtype is bfloat16"
    )
    vocab_divisible_by: Positive = Field(
        128, description="the vocabulary is padded to a multiple of this times tp"
    )


class TokenizerConfig(Section):
    path: str | None = Field(
        None, description="HF folder or SentencePiece .model file; unset: model.path's tokenizer"
    )


class ParallelConfig(Section):
    tp: Positive = Field(1, description="tensor-parallel size")
    pp: Positive = Field(1, description="pipeline-parallel size")
    cp: Positive = Field(1, description="context-parallel size: ranks that share each sequence")
    vpp: Positive = Field(
        1, description="virtual pipeline: model chunks on each pipeline rank (interleaved schedule)"
    )
    dp: Positive | None = Field(
        None, description="data-parallel size; unset: 1, or what torchrun's world size leaves"
    )
    sequence_parallel: bool = Field(
        False, description="shard the activations between the tensor-parallel regions too"
    )
    pipeline_layers: tuple[Positive, ...] | None = Field(
        None, description="layers of each of the pp * vpp stages, in order; unset: an even split"
    )
    timeout_minutes: PositiveFloat = Field(
        60.0,
        description="a collective that waits longer ends the run, and so does a rank that does not "
        "come when the others wait for it",
    )

    startup_timeout_s: PositiveFloat = Field(
        300.0, description="seconds for all ranks to come to the rendezvous when a run starts"
    )

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def num_stages(self) -> int:
        """Model chunks that a token passes through, one after the other."""
        return self.pp * self.vpp

    def tokens_on_one_rank(self, length: int) -> int:
        """Slots that a sequence takes on a rank: cp ranks share it in 2 cp equal chunks."""
        return length if self.cp == 1 else 2 * -(-length // (2 * self.cp))

    @property
    def world_size(self) -> int:
        """Ranks that a plainly started command launches."""
        return self.model_parallel_size * (self.dp or 1)


OBJECTIVES = {
    "ppo": "megafork.algorithms.objectives:ppo",
    "gspo": "megafork.algorithms.objectives:gspo",
    "cispo": "megafork.algorithms.objectives:cispo",
}
"""Objectives by name (see `megafork.system.plugins.load_plugin`)"""

ADVANTAGES = {"group": "megafork.algorithms.advantages:group_advantages", "gae": ""}
"""Advantages by name; "gae" is the critic's"""

WRITERS = {
    "tensorboard": "megafork.metrics.tensorboard_events:TensorBoardEvents",
    "wandb": "megafork.metrics.trackers:Wandb",
    "mlflow": "megafork.metrics.trackers:MLflow",
    "trackio": "megafork.metrics.trackers:Trackio",
}
"""Writers of metrics by name, which is also that of the package that each needs"""

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
        examples=[*OBJECTIVES, "MODULE:FUNCTION"],
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
        examples=[*ADVANTAGES, "MODULE:FUNCTION"],
    )
    credit: list[str] = Field(
        [],
        description="rules that weigh or leave out tokens after the selection, each as "
        "MODULE:FUNCTION; weights are multiplied",
        examples=["MODULE:FUNCTION"],
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
        examples=[*SELECTIONS, "MODULE:FUNCTION"],
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
        description="where the metrics of each step go beside metrics.jsonl",
        examples=[*WRITERS, "MODULE:CLASS"],
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
    final_dtype: Literal["bfloat16"] | None = Field(
        None, description="what the weights of checkpoints/final are rounded to; unset: model.dtype"
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

"""Every setting of a run: typed, described, with its default, which stands here and nowhere else.

Imports no torch, so `megafork --help` and a mistyped key answer at once. load.py reads TOML and
overrides; settings.py says in words what there is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megafork.config.counterparts import counterpart
from megafork.config.learning import (
    ADVANTAGES,
    CLIPS,
    LARGEST_OF_SEQUENCES,
    OBJECTIVES,
    SELECTIONS,
    SMALLEST_OF_TOKENS,
    WRITERS,
    AlgorithmConfig,
    CheckpointConfig,
    CriticConfig,
    EntropyBonusConfig,
    ForkingConfig,
    KLConfig,
    LoggingConfig,
    MismatchConfig,
    ModelConfig,
    ParallelConfig,
    Positive,
    PositiveFloat,
    RunConfig,
    Section,
    TokenizerConfig,
    TrainingConfig,
)
from megafork.config.rollouts import (
    BenchmarkConfig,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    GenerateConfig,
    GenerationConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    ServerConfig,
    SyncConfig,
)
from megafork.errors import UserError
from megafork.system.plugins import find_plugin

__all__ = [
    "AlgorithmConfig",
    "BenchmarkConfig",
    "CheckpointConfig",
    "CriticConfig",
    "DataConfig",
    "EntropyBonusConfig",
    "EvalConfig",
    "EvaluateConfig",
    "ForkingConfig",
    "GenerateConfig",
    "GenerationConfig",
    "KLConfig",
    "LoggingConfig",
    "MismatchConfig",
    "ModelConfig",
    "ParallelConfig",
    "PromptConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoreConfig",
    "Section",
    "ServerConfig",
    "SyncConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainingConfig",
]


class TrainConfig(Section):
    """`megafork train CONFIG.toml`."""

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    mismatch: MismatchConfig = MismatchConfig()
    forking: ForkingConfig = ForkingConfig()
    kl: KLConfig = KLConfig()
    entropy_bonus: EntropyBonusConfig = EntropyBonusConfig()
    training: TrainingConfig
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def check(self) -> None:
        """Raise UserError for settings that contradict each other, without reading a model file."""
        self.data.check(needs_answers=True)
        prompts, per_minibatch = self.rollout.prompts_per_step, self.training.prompts_per_minibatch
        if prompts % per_minibatch:
            raise UserError(
                f"training.prompts_per_minibatch={per_minibatch} must divide "
                f"rollout.prompts_per_step={prompts}: use one of {_divisors(prompts)}"
            )
        self.reward.check()
        self._check_names()
        self._check_selection()
        self._check_unused()
        self._check_objective()
        self._check_asynchrony()
        self._check_placement()
        self._check_reference()
        self._check_critic()
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        on_one_rank = self.parallel.tokens_on_one_rank(longest)
        if on_one_rank > self.training.micro_batch_tokens:
            raise UserError(
                f"training.micro_batch_tokens={self.training.micro_batch_tokens} cannot hold one "
                f"sequence of data.max_prompt_tokens + rollout.max_response_tokens = {longest} "
                f"tokens on parallel.cp={self.parallel.cp} ranks: raise it to at least "
                f"{on_one_rank}"
            )

    def _check_names(self) -> None:
        """Raise UserError for a plug-in that is neither a known name nor MODULE:FUNCTION, which is
        loaded later."""
        for setting, name, built_ins in (
            ("algorithm.objective", self.algorithm.objective, OBJECTIVES),
            ("algorithm.advantages", self.algorithm.advantages, ADVANTAGES),
            ("forking.select", self.forking.select, SELECTIONS),
        ):
            find_plugin(setting, name, built_ins, counterpart=counterpart(setting, name))
        for setting, names in (
            ("algorithm.credit", self.algorithm.credit),
            ("data.reader", [] if self.data.reader is None else [self.data.reader]),
        ):
            for name in names:
                find_plugin(setting, name, {})
        for name in self.logging.writers:
            find_plugin("logging.writers", name, WRITERS)
        if self.algorithm.advantages not in ADVANTAGES and not self.algorithm.normalize_advantage:
            raise UserError(
                "algorithm.normalize_advantage=false has no meaning for algorithm.advantages="
                f"{self.algorithm.advantages}, which normalizes by itself or not: leave it unset"
            )

    def _check_selection(self) -> None:
        forking = self.forking
        for name, rho in (("rho", forking.rho), ("rho_end", forking.rho_end)):
            if forking.select == "bottom" and rho == 1.0:
                raise UserError(
                    f"forking.select=bottom takes what forking.{name}=1 leaves out, which is "
                    f"nothing: lower {name}"
                )
        if forking.scope == "batch" and forking.entropy_of == "current":
            raise UserError(
                "forking.scope=batch takes one threshold before the first update, but "
                "forking.entropy_of=current has entropies of later mini-batches only after it: use "
                "scope=minibatch or entropy_of=old"
            )
        if (forking.rho_end is None) != (forking.rho_steps is None):
            raise UserError(
                f"forking.rho_end={forking.rho_end} and forking.rho_steps={forking.rho_steps} are "
                "one schedule: set both or neither"
            )
        if forking.rho_end is not None and forking.select == "all":
            raise UserError(
                f"forking.rho_end={forking.rho_end:g} has no meaning for forking.select=all, which "
                "takes every token: leave it unset or choose another select"
            )
        if forking.entropy_of == "current" and forking.select in ("random", "all"):
            raise UserError(
                f"forking.entropy_of=current has no meaning for forking.select={forking.select}, "
                "which looks at no entropy: leave it at old"
            )
        if forking.population == "response" and (
            forking.select == "all" or not self.algorithm.overlong_filtering
        ):
            raise UserError(
                "forking.population=response has a meaning only where algorithm.overlong_filtering "
                f"(now {str(self.algorithm.overlong_filtering).lower()}) takes tokens out of what "
                f"forking.select={forking.select} chooses from: leave it at loss"
            )
        if forking.population == "response" and forking.scope == "sequence":
            raise UserError(
                "forking.population=response has no meaning for forking.scope=sequence, where a "
                "filtered response moves no threshold but its own: leave it at loss"
            )

    def _check_unused(self) -> None:
        """Raise UserError for settings of what is off: the switch was forgotten, as a rule."""
        switches = ("coefficient", *(["reference"] if self.forking.compare_every else []))
        for name, section, is_on, switch, apart in (
            (
                "critic",
                self.critic,
                self.algorithm.uses_critic,
                "algorithm.advantages=gae",
                (),
            ),
            ("kl", self.kl, self.kl.coefficient > 0, "kl.coefficient above 0", switches),
            (
                "entropy_bonus",
                self.entropy_bonus,
                self.entropy_bonus.coefficient > 0,
                "entropy_bonus.coefficient above 0",
                ("coefficient",),
            ),
            (
                "mismatch",
                self.mismatch,
                self.mismatch.correction != "none",
                "mismatch.correction=truncate or mask",
                ("correction", "large_difference", "min_weight"),
            ),
        ):
            defaults = type(section).model_fields
            changed = [
                f"{name}.{key}={value}"
                for key, value in section
                if key not in apart and value != defaults[key].default
            ]
            if changed and not is_on:
                raise UserError(
                    f"{', '.join(changed)} without {switch} changes nothing: set that too, or "
                    "leave it unset"
                )

    def _check_asynchrony(self) -> None:
        rollout = self.rollout
        if rollout.tail == "carry" and rollout.max_policy_lag == 0:
            raise UserError(
                "rollout.tail=carry finishes responses after the policy has changed, but "
                "rollout.max_policy_lag=0 trains on none of those: raise it to 1 or more, or use "
                "tail=wait or tail=abort"
            )
        if rollout.seeded and (rollout.max_policy_lag or rollout.tail != "wait"):
            raise UserError(
                f"rollout.seeded=true asks for repeatable responses, which depend on the moment of "
                f"the weight update with rollout.max_policy_lag={rollout.max_policy_lag} and on "
                f"what is quick with rollout.tail={rollout.tail}: use max_policy_lag=0 and "
                "tail=wait, or seeded=false"
            )

    def _check_placement(self) -> None:
        rollout = self.rollout
        if self.sync.transport == "local" and rollout.url is not None:
            raise UserError(
                f"sync.transport=local is for servers that the trainer starts, but rollout.url="
                f"{rollout.url} names one that runs already: use transport=broadcast, or unset url"
            )
        if rollout.placement == "disaggregated":
            return
        if rollout.url is not None:
            raise UserError(
                f"rollout.placement=colocated has the trainer start servers on its own GPUs, but "
                f"rollout.url={rollout.url} names one that runs already: unset url, or use "
                "placement=disaggregated"
            )
        if rollout.tail == "carry":
            raise UserError(
                "rollout.tail=carry lets responses go on while the policy trains, but with "
                "rollout.placement=colocated the server sleeps then: use tail=wait or tail=abort, "
                "or placement=disaggregated"
            )
        if rollout.max_policy_lag:
            raise UserError(
                f"rollout.max_policy_lag={rollout.max_policy_lag} generates while the policy "
                "trains, but with rollout.placement=colocated the server sleeps then: use "
                "max_policy_lag=0, or placement=disaggregated"
            )

    def _check_objective(self) -> None:
        algorithm, mismatch = self.algorithm, self.mismatch
        if algorithm.objective == "cispo" and algorithm.clip_dual is not None:
            raise UserError(
                f"algorithm.clip_dual={algorithm.clip_dual:g} has no meaning for "
                "algorithm.objective=cispo, whose ratio algorithm.clip_high bounds at either sign "
                "of the advantage: leave it unset"
            )
        self._check_clips()
        if mismatch.correction != "none" and algorithm.old_logprobs == "engine":
            raise UserError(
                f"mismatch.correction={mismatch.correction} weighs by pi_old / pi_engine, which "
                "algorithm.old_logprobs=engine makes 1: the ratio itself corrects; set "
                "correction=none or old_logprobs=trainer"
            )
        if mismatch.min_weight is not None and mismatch.correction != "mask":
            raise UserError(
                f"mismatch.min_weight={mismatch.min_weight:g} is the lower end of "
                f"mismatch.correction=mask, but mismatch.correction={mismatch.correction}: leave "
                "it unset or set correction=mask"
            )
        buffer, longest = self.reward.overlong_buffer_tokens, self.rollout.max_response_tokens
        if buffer is not None and buffer > longest:
            raise UserError(
                f"reward.overlong_buffer_tokens={buffer} is more than "
                f"rollout.max_response_tokens={longest}: set it to {longest} or less"
            )

    def _check_clips(self) -> None:
        """Raise UserError for clips of another objective, whose ratio has another size."""
        algorithm = self.algorithm
        objective = algorithm.objective
        if objective == "cispo" and algorithm.clip_low != 1:
            raise UserError(
                f"algorithm.clip_low={algorithm.clip_low:g} bounds the ratio from below, which "
                "algorithm.objective=cispo does not: leave clip_low unset (1, no bound)"
            )
        if objective not in CLIPS:
            return
        for name, default in zip(("clip_low", "clip_high"), CLIPS[objective], strict=True):
            value = getattr(algorithm, name)
            if objective == "gspo" and value > LARGEST_OF_SEQUENCES:
                raise UserError(
                    f"algorithm.{name}={value:g} never acts on algorithm.objective=gspo, whose "
                    "ratio is a mean over the response and moves by thousandths: use about "
                    f"{default:g} (its default) or objective=ppo"
                )
            if objective == "ppo" and value < SMALLEST_OF_TOKENS:
                raise UserError(
                    f"algorithm.{name}={value:g} is the size of a whole response's ratio and would "
                    "clip nearly every token's, which algorithm.objective=ppo takes: use about "
                    f"{default:g} (its default) or objective=gspo"
                )

    def _check_reference(self) -> None:
        every, select = self.forking.compare_every, self.forking.select
        if every and not self.forking.by_entropy:
            raise UserError(
                f"forking.compare_every={every} compares selections by two policies' entropies, "
                f"but forking.select={select} does not select by them: set it to 0 or select=top"
            )

    def _check_critic(self) -> None:
        rollout = self.rollout
        if rollout.group_size == 1 and (
            self.algorithm.advantages == "group" or rollout.dynamic_sampling
        ):
            raise UserError(
                "rollout.group_size=1 leaves a response nothing to be compared with: use 2 or "
                "more, or algorithm.advantages=gae with rollout.dynamic_sampling=false"
            )
        if self.critic.alone_steps >= self.training.steps:
            raise UserError(
                f"critic.alone_steps={self.critic.alone_steps} leaves none of training.steps="
                f"{self.training.steps} to the policy: lower it"
            )


class ScoredModelConfig(ModelConfig):
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of weights and activations; bfloat16 differs by layout"
    )


class ScoreConfig(Section):
    """The overrides that `megafork score` takes."""

    model: ScoredModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    temperature: PositiveFloat = Field(1.0, description="temperature of both columns")
    micro_batch_tokens: Positive = Field(
        32768, description="tokens of one packed micro-batch on one rank (a sequence is on cp)"
    )
    batch_sequences: Positive = Field(4096, description="input lines held in memory at once")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)

"""Every setting of a run: typed, described, with its default, which stands here and nowhere else.

Imports no torch, so `megafork --help` and a mistyped key answer at once. config_file.py reads TOML
and overrides.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from megafork.errors import UserError

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
    path: str = Field(description="HF folder of the policy (config.json and safetensors)")
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
        60.0, description="a collective that waits longer ends the run (generation included)"
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


class DataConfig(Section):
    train: str = Field(description="jsonl of {prompt_key, answer_key} rows to train on")
    eval: str | None = Field(None, description="jsonl of held-out rows, same columns")
    prompt_key: str = Field("prompt", description="column with the prompt text")
    answer_key: str = Field("answer", description="column handed to the verifier")
    chat_template: bool = Field(
        False, description="wrap the prompt as a user turn of the tokenizer's chat template"
    )
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are an error")
    seed: int = Field(0, description="seed of the order of the prompts, new in every epoch")


class RolloutConfig(Section):
    prompts_per_step: Positive = Field(512, description="groups of one rollout batch")
    group_size: Annotated[int, Field(ge=2)] = Field(16, description="responses for each prompt")
    max_response_tokens: Positive = Field(20480, description="longer responses are cut")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature")
    dynamic_sampling: bool = Field(
        True, description="replace groups whose responses are all right or all wrong (DAPO)"
    )
    max_sampling_rounds: Positive = Field(
        10, description="stop when a batch is still not full after this many rounds of prompts"
    )
    surplus: Literal["carry", "drop"] = Field(
        "carry", description="admissible groups beyond the batch: into the next batch, or dropped"
    )
    max_staleness: NonNegative = Field(
        1, description="carried groups sampled more policy versions ago than this are dropped"
    )
    seeded: bool = Field(
        False, description="a seed for every request: repeatable responses, slower generation"
    )
    url: str | None = Field(None, description="a running server to use; unset: start one")
    api_key_env: str = Field(
        "MEGAFORK_API_KEY",
        description="variable with the key of url and serve",
    )
    python: str | None = Field(None, description="Python that has vLLM; unset: this one")
    tensor_parallel: Positive = Field(1, description="tensor-parallel size of the server")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the server; unset: the policy's"
    )
    max_num_seqs: Positive = Field(256, description="responses that the server runs at once")
    gpu_memory_utilization: Fraction = Field(0.6, description="GPU memory for the server")
    cpu_kv_cache_gib: Positive = Field(1, description="KV cache of a CPU server, GiB")
    startup_timeout_s: PositiveFloat = Field(600.0, description="seconds for the server to come up")
    request_timeout_s: PositiveFloat = Field(3600.0, description="seconds for one request")
    max_restarts: NonNegative = Field(
        3, description="how often a server that died is replaced before a step goes on"
    )


class RewardConfig(Section):
    verifier: str = Field(
        description="import path MODULE:FUNCTION of (prompt, response, answer) -> reward in 0..1"
    )
    accuracy_at: float = Field(1.0, description="a response is right when its reward reaches this")
    overlong_buffer_tokens: Positive | None = Field(
        None,
        description="soft overlong punishment: the reward falls over the last this many tokens "
        "before rollout.max_response_tokens; unset: off",
    )
    overlong_penalty: PositiveFloat = Field(
        1.0, description="what the reward has lost at rollout.max_response_tokens"
    )


class AlgorithmConfig(Section):
    objective: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo",
        description="what is clipped: each token's ratio (GRPO, DAPO); its sequence's (gspo); the "
        "token's as a constant factor of its log-probability (cispo)",
    )
    clip_low: Fraction = Field(
        0.2, description="epsilon below 1 of the clipped ratio (gspo: about 3e-4; 1 is no bound)"
    )
    clip_high: PositiveFloat = Field(
        0.28, description="epsilon above 1, DAPO's clip-higher (gspo: about 4e-4)"
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
    normalize_advantage: bool = Field(
        True, description="divide the centred rewards of a group by their standard deviation"
    )
    overlong_filtering: bool = Field(
        True, description="responses cut at max_response_tokens take no part in the loss"
    )


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
    select: Literal["top", "bottom", "random", "all"] = Field(
        "top", description="which response tokens carry the policy gradient"
    )
    rho: Fraction = Field(0.2, description="fraction of the tokens, by entropy")
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


class SyncConfig(Section):
    bucket_mib: Positive = Field(256, description="weights travel in buckets of this size")
    check_every: NonNegative = Field(
        10, description="steps between comparisons of trainer and server (0: the first push only)"
    )
    check_prompts: Positive = Field(8, description="prompts of one comparison")
    max_mean_difference: PositiveFloat | None = Field(
        None, description="bound of mean |log-probability difference|; unset: by dtype"
    )
    max_k3: PositiveFloat | None = Field(None, description="bound of the k3 KL; unset: by dtype")
    timeout_s: PositiveFloat = Field(300.0, description="seconds for one weight push")


class EvalConfig(Section):
    every: NonNegative = Field(0, description="steps between evaluations (0: start and end only)")
    prompts: Positive | None = Field(None, description="held-out prompts; unset: all of them")
    samples: Positive = Field(1, description="responses for each held-out prompt")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature of the evaluation")


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
    mismatch: MismatchConfig = MismatchConfig()
    forking: ForkingConfig = ForkingConfig()
    training: TrainingConfig
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def check(self) -> None:
        """Cross-field rules that need no file of the model's. Raises UserError."""
        prompts, per_minibatch = self.rollout.prompts_per_step, self.training.prompts_per_minibatch
        if prompts % per_minibatch:
            raise UserError(
                f"training.prompts_per_minibatch={per_minibatch} must divide "
                f"rollout.prompts_per_step={prompts}: use one of {_divisors(prompts)}"
            )
        if self.forking.select == "bottom" and self.forking.rho == 1.0:
            raise UserError(
                "forking.select=bottom takes what forking.rho=1 leaves out, which is nothing: "
                "lower rho"
            )
        if self.forking.scope == "batch" and self.forking.entropy_of == "current":
            raise UserError(
                "forking.scope=batch takes one threshold before the first update, but "
                "forking.entropy_of=current has entropies of later mini-batches only after it: use "
                "scope=minibatch or entropy_of=old"
            )
        self._check_objective()
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        on_one_rank = self.parallel.tokens_on_one_rank(longest)
        if on_one_rank > self.training.micro_batch_tokens:
            raise UserError(
                f"training.micro_batch_tokens={self.training.micro_batch_tokens} cannot hold one "
                f"sequence of data.max_prompt_tokens + rollout.max_response_tokens = {longest} "
                f"tokens on parallel.cp={self.parallel.cp} ranks: raise it to at least "
                f"{on_one_rank}"
            )

    def _check_objective(self) -> None:
        algorithm, mismatch = self.algorithm, self.mismatch
        if algorithm.objective == "cispo" and algorithm.clip_dual is not None:
            raise UserError(
                f"algorithm.clip_dual={algorithm.clip_dual:g} has no meaning for "
                "algorithm.objective=cispo, whose ratio algorithm.clip_high bounds at either sign "
                "of the advantage: leave it unset"
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

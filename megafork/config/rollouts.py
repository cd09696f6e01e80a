"""The sections of what generates and judges: data, servers, rollouts, rewards, evaluation."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megafork.answers.places import Place
from megafork.config.learning import (
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    TokenizerConfig,
)
from megafork.errors import UserError

PLACEHOLDER = "{problem}"
_ESCAPES = {"\b": "b", "\t": "t", "\n": "n", "\f": "f", "\r": "r", "\x1b": "e"}
"""Characters that TOML's strings in double quotes write with a backslash and a letter"""
_SWALLOWED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    r"|\t(?=(ext(bf|it|tt|rm)?|heta|imes|frac|ilde|au|herefore|riangle)(?![a-z]))"
    r"|\n(?=(abla|eq|eg|otin|ewline)(?![a-z]))"
)
"""Control characters; a tab or new line that TOML made of \\text, \\times, \\neq and the like"""


class PromptConfig(Section):
    """Columns are looked up by their whole name first, then as a path through nested columns."""

    prompt_key: str | None = Field(
        None,
        description="column with the prompt: text, or a list of {role, content} turns; unset: "
        "prompt, problem, question, or another known name (docs/data.md)",
    )
    answer_key: str | None = Field(
        None,
        description="column for the verifier, as answer or reward_model.ground_truth; unset: "
        "the one of a known name (docs/data.md); empty: none",
    )
    template: str | None = Field(
        None,
        description="text around the prompt, which stands for {problem}, before the chat template; "
        "unset: none",
    )
    chat_template: bool = Field(
        False, description="wrap the prompt as a user turn of the tokenizer's chat template"
    )
    enable_thinking: bool | None = Field(
        None, description="handed to a chat template that knows it (Qwen3); unset: its own default"
    )
    max_prompt_tokens: Positive = Field(1024, description="a prompt's tokens at most")
    too_long: Literal["error", "drop"] = Field(
        "error", description="rows with longer prompts: an error, or left out and counted"
    )
    reader: str | None = Field(
        None,
        description="MODULE:FUNCTION that gives a file's rows as dicts, (path) -> rows; unset: by "
        "the kind of the file",
        examples=["MODULE:FUNCTION"],
    )

    @field_validator("template")
    @classmethod
    def _holds_the_problem(cls, template: str | None) -> str | None:
        if template is not None and PLACEHOLDER not in template:
            raise ValueError(f"must contain {PLACEHOLDER}, where the prompt goes")
        return template

    @field_validator("template")
    @classmethod
    def _holds_no_control_characters(cls, template: str | None) -> str | None:
        if template is not None and (found := _SWALLOWED.search(template)):
            rest = template[found.end() : found.end() + 12]
            fix = "take it out"
            if letter := _ESCAPES.get(found[0]):
                fix = (
                    f"a TOML string in double quotes reads \\{letter} as that; write the "
                    f"template in single quotes, or double the backslash (\\\\{letter}{rest})"
                )
            raise ValueError(
                f"holds the control character U+{ord(found[0]):04X} before {rest!r}: {fix}"
            )
        return template

    def check(self, *, needs_answers: bool) -> None:
        """Raise UserError for settings that contradict each other or lack needed answers."""
        if needs_answers and self.answer_key == "":
            raise UserError("data.answer_key is empty, but the verifier needs answers: name it")
        if self.enable_thinking is not None and not self.chat_template:
            raise UserError(
                f"data.enable_thinking={str(self.enable_thinking).lower()} is handed to the chat "
                "template: set data.chat_template=true too, or leave it unset"
            )


class DataConfig(PromptConfig):
    """`megafork train`. docs/data.md tells the kinds of files."""

    train: str | Annotated[list[str], Field(min_length=1)] = Field(
        description="rows to train on: .jsonl, .json, .csv, .tsv (or these as .gz), .parquet, a "
        "save_to_disk folder, hf:owner/name:split, a pattern such as data/*.parquet, or a list"
    )
    eval: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="held-out rows, in the same forms"
    )
    seed: int = Field(0, description="seed of the order of the prompts, new in every epoch")
    allow_changed: bool = Field(
        False, description="go on with a run although its rows or data.seed are not what they were"
    )


class BenchmarkConfig(PromptConfig):
    """`megafork generate | eval`."""

    id_key: str | None = Field(
        None,
        description="column that tells the problems apart; empty: the number of the row; unset: "
        "id or another known name (docs/data.md), or the number",
    )


class ServerConfig(Section):
    """The settings of a server, and the bounds of a response."""

    max_response_tokens: Positive = Field(20480, description="longer responses are cut")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature")
    url: str | list[str] | None = Field(
        None,
        description="a running server to use, or a list of them; unset or []: start "
        "rollout.servers",
    )
    servers: Positive = Field(
        1, description="servers that a run starts on each node, each with tensor_parallel GPUs"
    )
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
    cpu_threads: Positive | None = Field(
        None,
        description="threads of a CPU server; unset: OMP_NUM_THREADS, else the cores over servers",
    )
    cpu_kv_cache_gib: Positive = Field(1, description="KV cache of a CPU server, GiB")
    startup_timeout_s: PositiveFloat = Field(600.0, description="seconds for the server to come up")
    request_timeout_s: PositiveFloat = Field(3600.0, description="seconds for one request")

    @field_validator("url")
    @classmethod
    def _unset_by_an_empty_list(cls, url: str | list[str] | None) -> str | list[str] | None:
        """TOML has no null: what a resumed run's config holds can be taken away by [] alone."""
        return url or None if isinstance(url, list) else url

    @property
    def urls(self) -> list[str]:
        """The addresses of the servers that run already; empty: servers are to be started."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return [url.rstrip("/") for url in given]


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
        "response, answer) -> reward as MODULE:FUNCTION; or a list of them",
        examples=["maths", "countdown", "exact", "reasoning-gym:TASK", "MODULE:FUNCTION"],
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


class ServedModelConfig(Section):
    path: str = Field(
        description="HF folder, owner/name on the hub, a run's folder, or a run's "
        "checkpoints/step_000010"
    )


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
        """Raise UserError for settings that contradict each other or lack needed answers."""
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
        """Raise UserError for settings that contradict each other or lack needed answers."""
        self.data.check(needs_answers=True)
        self.reward.check()
        if self.reward.overlong_buffer_tokens is not None:
            raise UserError(
                f"reward.overlong_buffer_tokens={self.reward.overlong_buffer_tokens} shapes the "
                "rewards of training; an evaluation reports what the verifier says: leave it unset"
            )


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
        """Raise UserError for settings that contradict each other or lack needed answers."""
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

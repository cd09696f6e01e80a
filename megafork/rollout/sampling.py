"""How a response is sampled, and what comes back. Imports neither torch nor vLLM."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

# Routes that the server answers itself.
GENERATE_PATH = "/megafork/generate"  # token ids in, `encode_completions` out
ABORT_PATH = "/megafork/abort"
CONNECT_PATH = "/megafork/connect"
UPDATE_PATH = "/megafork/update"

# Of a request's extra_args: [threshold, temperature above, temperature below].
TWO_TEMPERATURES = "megafork_two_temperatures"


@dataclass(frozen=True)
class TwoTemperatures:
    """A token is drawn at `above` where the entropy of softmax(logits) is above the threshold, at
    `below` elsewhere, a tie included. 0 is greedy."""

    threshold: float  # nats
    above: float = 1.0
    below: float = 1.0


@dataclass(frozen=True)
class Sampling:
    """The distribution that responses are drawn from: softmax(logits / temperature), uncut.

    `stop_token_ids` end a response and stay its last token. The model folder's own EOS token is
    not consulted: without stop ids every response runs to `max_tokens`.
    """

    temperature: float = 1.0  # 0 is greedy
    max_tokens: int = 512  # of one response, the stop token included
    stop_token_ids: tuple[int, ...] = ()
    top_p: float = 1.0  # below 1 the distribution is truncated and so are its log-probabilities
    top_k: int = -1  # -1: every token
    min_p: float = 0.0
    forking_temperatures: TwoTemperatures | None = None
    """Instead of the temperature, which then is 1. The server must have been started with
    two_temperatures=True."""

    def request_body(
        self, prompt_ids: list[int], n: int, seed: int | None = None, *, request_id: str
    ) -> dict[str, Any]:
        """JSON body for `n` responses to one prompt, which `request_id` can abort.

        Every parameter that shapes the distribution is stated, so that neither the engine's
        defaults nor the folder's generation_config.json can change it.
        """
        extra: dict[str, Any] = {}
        if self.forking_temperatures is not None:
            extra["extra_args"] = {TWO_TEMPERATURES: list(astuple(self.forking_temperatures))}
        return {
            "prompt_ids": list(prompt_ids),
            "request_id": request_id,
            "sampling_params": {
                "n": n,
                "seed": seed,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": self.top_k,
                "min_p": self.min_p,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "repetition_penalty": 1.0,
                "max_tokens": self.max_tokens,
                "min_tokens": 0,
                "ignore_eos": True,  # stop_token_ids alone decide
                "stop_token_ids": list(self.stop_token_ids),
                "logprobs": 0,  # of the sampled token alone
                "detokenize": False,
                **extra,
            },
        }


@dataclass(frozen=True)
class Completion:
    """One response as the engine sampled it: `logprobs[i]` (nats, at the sampling temperature)
    belongs to `token_ids[i]`; a stop token is the last of them."""

    token_ids: np.ndarray  # int32
    logprobs: np.ndarray  # float32
    finish_reason: str  # "stop" | "length" | "abort"
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(policy version, index of the first token that it sampled), ascending"""

    @property
    def truncated(self) -> bool:
        return self.finish_reason != "stop"

    @property
    def aborted(self) -> bool:
        return self.finish_reason == "abort"


UNANSWERED = Completion(np.empty(0, np.int32), np.empty(0, np.float32), "abort")
"""The response to a request that was aborted before its first token"""


def version_number(version: str) -> int:
    """Of vLLM's name for the weights it has; 0: those that it loaded from the model folder."""
    return 0 if version == "default" else int(version)


def encode_completions(completions: list[Completion]) -> bytes:
    """A line of JSON, then all ids (int32), then all log-probabilities (float32).

    8 bytes a token where the stock route's JSON takes about 100. Little-endian.
    """
    header = [[len(c.token_ids), c.finish_reason, c.versions] for c in completions]
    ids = [np.asarray(c.token_ids, "<i4").tobytes() for c in completions]
    logprobs = [np.asarray(c.logprobs, "<f4").tobytes() for c in completions]
    return b"".join([json.dumps(header).encode(), b"\n", *ids, *logprobs])


def decode_completions(payload: bytes) -> list[Completion]:
    """The inverse of `encode_completions`; the arrays are views of the payload.

    Raises ValueError when the payload is cut short.
    """
    line, _, rest = payload.partition(b"\n")
    header = json.loads(line)
    num_tokens = sum(length for length, *_ in header)
    if len(rest) != 8 * num_tokens:
        raise ValueError(f"{len(rest)} bytes for {num_tokens} tokens, expected {8 * num_tokens}")
    ids = np.frombuffer(rest, "<i4", num_tokens)
    logprobs = np.frombuffer(rest, "<f4", num_tokens, 4 * num_tokens)
    completions, start = [], 0
    for length, finish_reason, versions in header:
        end = start + length
        completions.append(
            Completion(
                ids[start:end],
                logprobs[start:end],
                finish_reason,
                [(version, first) for version, first in versions],
            )
        )
        start = end
    return completions

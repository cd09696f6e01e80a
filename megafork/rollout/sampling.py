"""The way a response is sampled, and what comes back. Imports neither torch nor vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from megafork.data.sample import Sample

# Routes that the server answers itself.
GENERATE_PATH = "/megafork/generate"  # token ids in, `encode_samples` out
ABORT_PATH = "/megafork/abort"
CONNECT_PATH = "/megafork/connect"
UPDATE_PATH = "/megafork/update"

# Of a request's extra_args: [threshold, temperature above, temperature below].
TWO_TEMPERATURES = "megafork_two_temperatures"


@dataclass(frozen=True)
class TwoTemperatures:
    """Two temperatures, chosen token by token: `above` where the entropy of softmax(logits) is
    above the threshold, `below` elsewhere, a tie included. 0 is greedy."""

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
    """Used instead of the temperature, which then has to be 1. The server must have been started
    with two_temperatures=True."""

    def request_body(
        self, prompt_ids: list[int], n: int, seed: int | None = None, *, request_id: str
    ) -> dict[str, Any]:
        """Make the JSON body for `n` responses to one prompt, which `request_id` can abort.

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


def version_number(version: str) -> int:
    """Return the number in vLLM's name for its weights; 0 for those of the model folder."""
    return 0 if version == "default" else int(version)


def encode_samples(samples: Sequence[Sample]) -> bytes:
    """Return a line of JSON, then all ids (int32), then all log-probabilities (float32).

    8 bytes a token where the stock route's JSON takes about 100. Little-endian. Blanks behind the
    JSON align the arrays, so that they can be read where they are.
    """
    header = json.dumps([[s.num_tokens, s.finish_reason, s.versions] for s in samples]).encode()
    ids = [s.token_ids.astype("<i4", copy=False).tobytes() for s in samples]
    logprobs = [s.logprobs.astype("<f4", copy=False).tobytes() for s in samples]
    return b"".join([header, b" " * (-(len(header) + 1) % 8), b"\n", *ids, *logprobs])


def decode_samples(payload: bytes) -> list[Sample]:
    """Invert `encode_samples`; the arrays are views of the payload.

    Raises ValueError when the payload is cut short.
    """
    start = payload.find(b"\n") + 1
    header = json.loads(payload[:start])
    num_tokens = sum(length for length, *_ in header)
    if len(payload) - start != 8 * num_tokens:
        raise ValueError(
            f"{len(payload) - start} bytes for {num_tokens} tokens, expected {8 * num_tokens}"
        )
    ids = np.frombuffer(payload, "<i4", num_tokens, start)
    logprobs = np.frombuffer(payload, "<f4", num_tokens, start + 4 * num_tokens)
    samples, first = [], 0
    for length, finish_reason, versions in header:
        rows = slice(first, first + length)
        samples.append(Sample.from_server(ids[rows], logprobs[rows], finish_reason, versions))
        first = rows.stop
    return samples

"""The bodies of a server's own routes: the types that its engine was made for, and nothing else.

An engine that is handed a token of 1.5 may hang for good without a word, so nothing reaches it that
is not checked here. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megafork.rollout.sampling import (
    ABORT_PATH,
    CONNECT_PATH,
    GENERATE_PATH,
    TWO_TEMPERATURES,
    UPDATE_PATH,
)

_MOST_RESPONSES = 16_384
"""vLLM's own limit"""
_LONGEST_NAME = 256

Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME)]
Temperature = Annotated[float, Field(ge=0)]


class Body(BaseModel):
    """A strict body: True is no number, 1.0 no count, "1" no 1, NaN nothing; unknown keys fail."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ExtraArgs(Body):
    two_temperatures: Annotated[list[float], Field(min_length=3, max_length=3)] = Field(
        alias=TWO_TEMPERATURES
    )


class SamplingParameters(Body):
    """The parameters that `Sampling.request_body` sends."""

    n: Annotated[int, Field(ge=1, le=_MOST_RESPONSES)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    temperature: Temperature = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Count
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    stop_token_ids: list[Token] = []
    logprobs: Literal[0] = 0
    detokenize: Literal[False] = False
    extra_args: ExtraArgs | None = None


class Generate(Body):
    prompt_ids: Annotated[list[Token], Field(min_length=1)]
    request_id: Name
    sampling_params: SamplingParameters


class Abort(Body):
    request_ids: list[Name]


class BroadcastSender(Body):
    host: Name
    port: Annotated[int, Field(ge=1, lt=2**16)]
    device: Literal["cpu", "cuda"]


class FileSender(Body):
    host: Name
    file: Annotated[str, Field(min_length=1, max_length=4096)]
    device: Literal["cpu", "cuda"]


class LocalSender(Body):
    socket: Name
    token: Name


class Connect(Body):
    senders: Annotated[list[BroadcastSender | FileSender | LocalSender], Field(min_length=1)]
    num_workers: Count
    first_worker: Annotated[int, Field(ge=0, lt=2**31)] = 0
    timeout_s: Seconds


class Bucket(Body):
    sender: Annotated[int, Field(ge=0, lt=2**31)]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    names: Annotated[list[str], Field(min_length=1)]
    shapes: list[list[Annotated[int, Field(ge=0, lt=2**48)]]]


class Update(Body):
    buckets: list[Bucket]


_BODIES: dict[str, type[Body]] = {
    GENERATE_PATH: Generate,
    ABORT_PATH: Abort,
    CONNECT_PATH: Connect,
    UPDATE_PATH: Update,
}
OWN_PATHS = frozenset(_BODIES)
ENGINE_PATHS = frozenset(
    {
        *("/is_paused", "/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache"),
        *("/update_weight_version", "/weight_info", "/v1/models"),
    }
)
"""Routes of vLLM's that a run uses; the others of its development mode can run any method"""


def parsed_body(path: str, content: bytes) -> dict[str, Any]:
    """Parse a request to one of OWN_PATHS. Raises ValueError that names what is wrong."""
    try:
        body = json.loads(content)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    try:
        return _BODIES[path].model_validate(body).model_dump(exclude_unset=True, by_alias=True)
    except ValidationError as error:
        raise ValueError(_told(error)) from None


def check_tokens(prompt_ids: list[int], vocab_size: int) -> None:
    """Raise ValueError for an id that the model does not have: vLLM would crash."""
    if (largest := max(prompt_ids)) >= vocab_size:
        raise ValueError(f"prompt token {largest} is not in the vocabulary of {vocab_size}")


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the body"
    given = repr(first["input"])
    return f"{place}: {first['msg']}, not {given[:80]}"

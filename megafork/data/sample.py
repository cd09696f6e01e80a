"""A response and a group of responses, before they are rows of a token table. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """A response, as it came from the server and, once it is judged, from the verifier.

    Raises ValueError where there are not as many log-probabilities as tokens.
    """

    uid: int
    """Unique over the whole run; -1 until the collector numbers it"""
    token_ids: np.ndarray
    """int32 [N], a stop token the last of them; any sequence of integers is taken"""
    logprobs: np.ndarray
    """float32 [N], nats, at the sampling temperature; any sequence of numbers is taken"""
    truncated: bool
    """It has no end: it is as long as a response may be, or was aborted"""
    reward: float = 0.0
    accuracy: float = 0.0
    failure: str | None = None
    """Why the verifier gave no verdict (`Failure` of verifiers/pool.py): reward and accuracy are 0
    then, but for what a long response loses"""
    versions: Sequence[tuple[int, int]] = ()
    """(policy version, index of the first token that it sampled), ascending, the first index 0;
    empty: the group's version sampled all"""
    aborted: bool = False
    num_tokens: int = -1
    """N, also after `without_tokens`; -1: as many as there are"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, np.int32))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, np.float32))
        object.__setattr__(self, "versions", tuple(map(tuple, self.versions)))
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"{len(self.token_ids)} tokens and {len(self.logprobs)} log-probabilities"
            )
        if self.num_tokens < 0:
            object.__setattr__(self, "num_tokens", len(self.token_ids))

    @classmethod
    def from_server(
        cls,
        token_ids: Sequence[int] | np.ndarray,
        logprobs: Sequence[float] | np.ndarray,
        finish_reason: str | None,
        versions: Sequence[tuple[int, int]] = (),
    ) -> Self:
        """Make the sample of a server's answer. finish_reason: vLLM's; "stop": it has an end."""
        return cls(
            -1,
            np.asarray(token_ids),
            np.asarray(logprobs),
            finish_reason != "stop",
            versions=versions,
            aborted=finish_reason == "abort",
        )

    @property
    def finish_reason(self) -> str:
        """Return "stop", "length" or "abort"."""
        if self.aborted:
            return "abort"
        return "length" if self.truncated else "stop"

    def without_tokens(self) -> Self:
        """Return the sample without its arrays, for one that nobody trains on."""
        return replace(self, token_ids=self.token_ids[:0].copy(), logprobs=self.logprobs[:0].copy())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample):
            return NotImplemented
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


UNANSWERED = Sample.from_server((), (), "abort")
"""The response to a request that was aborted before its first token"""


@dataclass(frozen=True)
class Group:
    """The responses to one prompt."""

    prompt_index: int
    """Position of the prompt in the endless stream of training prompts."""
    prompt_ids: list[int]
    policy_version: int
    """The version that began to sample the responses, so the oldest of all their tokens."""
    samples: list[Sample] = field(default_factory=list)
    is_whole: bool = True
    """False: aborted when its batch was full; not judged, and never trained on"""
    step: int = field(default=0, compare=False)
    """The step whose journal it is in; 0 while it is in none"""

    @cached_property
    def is_finite(self) -> bool:
        """Rewards and log-probabilities are numbers that can be trained on."""
        return all(
            math.isfinite(s.reward) and bool(np.isfinite(s.logprobs).all()) for s in self.samples
        )

    @property
    def has_signal(self) -> bool:
        """Neither all right nor all wrong, by the verifier's accuracy (DAPO dynamic sampling)."""
        return len({sample.accuracy for sample in self.samples}) > 1

    def without_tokens(self) -> Group:
        """Return the group without its samples' arrays."""
        return replace(self, samples=[sample.without_tokens() for sample in self.samples])


def version_runs(
    versions: Sequence[tuple[int, int]], oldest: int, num_tokens: int
) -> Iterator[tuple[int, int]]:
    """Yield each (policy version, number of tokens that it sampled) of a response, in order.

    versions: as in `Sample`. oldest: the group's version, which sampled all tokens if `versions` is
    empty.
    """
    starts = versions or ((oldest, 0),)
    ends = [*(first for _, first in starts[1:]), num_tokens]
    for (version, first), end in zip(starts, ends, strict=True):
        yield version, min(end, num_tokens) - min(first, num_tokens)


def known_columns(
    groups: Sequence[Group], *, overlong_filtering: bool = False
) -> dict[str, np.ndarray]:
    """Return what can be known of the groups' samples without their tokens.

    The columns of `TokenTable` for B samples, by name: int64 [B], rewards float32 [B], truncated_B
    uint8 [B], prompt_ids_P int64 [P]. overlong_filtering: truncated responses have no token in the
    loss.
    """
    samples = [(group, sample) for group in groups for sample in group.samples]
    lengths_B = np.array([sample.num_tokens for _, sample in samples], np.int64)
    truncated_B = np.array([sample.truncated for _, sample in samples], np.uint8)
    prompts = [np.asarray(group.prompt_ids, np.int64) for group, _ in samples]
    return {
        "uid_B": np.array([sample.uid for _, sample in samples], np.int64),
        "group_B": np.array([group.prompt_index for group, _ in samples], np.int64),
        "prompt_ids_P": np.concatenate([np.empty(0, np.int64), *prompts]),
        "prompt_lengths_B": np.array([len(ids) for ids in prompts], np.int64),
        "response_lengths_B": lengths_B,
        "num_loss_tokens_B": np.where(truncated_B & overlong_filtering, 0, lengths_B),
        "reward_B": np.array([sample.reward for _, sample in samples], np.float32),
        "accuracy_B": np.array([sample.accuracy for _, sample in samples], np.float32),
        "truncated_B": truncated_B,
    }

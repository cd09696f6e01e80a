"""A response and a group of responses, before they are rows of a token table. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """One response, as it came from the engine and the verifier.

    Raises ValueError where there are not as many log-probabilities as tokens.
    """

    uid: int
    token_ids: np.ndarray
    """int32 [N]; any sequence of integers is taken"""
    logprobs: np.ndarray
    """float32 [N], nats; any sequence of numbers is taken"""
    truncated: bool
    reward: float = 0.0
    accuracy: float = 0.0
    failure: str | None = None
    """Why the verifier gave no verdict (`Failure` of rewards/pool.py): reward and accuracy are 0
    then, but for what a long response loses"""
    versions: Sequence[tuple[int, int]] = ()
    """(policy version, index of the first token that it sampled), ascending, the first index 0;
    empty: the group's version sampled all"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, np.int32))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, np.float32))
        object.__setattr__(self, "versions", tuple(map(tuple, self.versions)))
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"{len(self.token_ids)} tokens and {len(self.logprobs)} log-probabilities"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample):
            return NotImplemented
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


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

    @property
    def is_finite(self) -> bool:
        """Rewards and log-probabilities are numbers that can be trained on."""
        return all(
            math.isfinite(s.reward) and bool(np.isfinite(s.logprobs).all()) for s in self.samples
        )

    def summary(self, replica: int = 0, step: int = 0) -> GroupSummary:
        samples = [
            SampleSummary(
                s.uid,
                len(s.token_ids),
                s.truncated,
                s.reward,
                s.accuracy,
                s.failure,
                s.versions,
            )
            for s in self.samples
        ]
        return GroupSummary(
            self.prompt_index,
            self.prompt_ids,
            self.policy_version,
            samples,
            self.is_whole,
            self.is_finite,
            replica,
            step,
        )


@dataclass(frozen=True)
class SampleSummary:
    """A `Sample` without its tokens."""

    uid: int
    num_tokens: int
    truncated: bool
    reward: float
    accuracy: float
    failure: str | None
    versions: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class GroupSummary:
    """A `Group` whose tokens are elsewhere: what decides whether it is trained on."""

    prompt_index: int
    prompt_ids: list[int]
    policy_version: int
    samples: list[SampleSummary]
    is_whole: bool
    is_finite: bool
    replica: int
    """The data-parallel replica whose first rank has the tokens"""
    step: int
    """The step whose journal it is in; 0 while it is in none"""

    @property
    def has_signal(self) -> bool:
        """Neither all right nor all wrong, by the verifier's accuracy (DAPO dynamic sampling)."""
        return len({sample.accuracy for sample in self.samples}) > 1


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

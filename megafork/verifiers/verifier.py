"""The meaning of a verifier's scores: the reward, and whether the response is right."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from megafork.answers.places import BOXED, Search
from megafork.config import RewardConfig
from megafork.errors import UserError
from megafork.verifiers.pool import NO_COLUMNS, Failure, WorkerPool

_MOST_WORKERS = 32


@dataclass(frozen=True)
class Verdict:
    """The verifiers' judgement of one response."""

    reward: float
    accuracy: float
    """1.0: the response is right; else 0.0"""
    failure: Failure | None = None
    """Why there is no verdict, and reward and accuracy are 0"""


class Judge:
    """Verifiers in workers of their own, and the rule for calling a response right. Close it.

    Any event loop of any thread can await it. One that is given up (cancelled) costs nothing while
    no worker has it, and a worker's time until its deadline after that.
    """

    def __init__(self, config: RewardConfig) -> None:
        config.check()
        self.config = config
        self.causes: dict[str, str] = {}
        """Of each kind of failure: the first, with its prompt and response"""
        self.tell: Callable[[str], None] = lambda text: None
        """Called at most once, from any thread, when the first responses have no answer"""
        self.workers = config.workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
        self._weights = config.weights or [1.0]
        self._pool = WorkerPool(
            config.verifiers,
            workers=self.workers,
            timeout_s=config.timeout_s,
            memory_mib=config.memory_mib,
            places=config.places,
            environment=config.environment,
        )
        self._search = Search(config.places or BOXED) if config.verifiers[0] == "maths" else None

    async def __call__(
        self, prompt: str, response: str, answer: str, columns: Mapping[str, Any] = NO_COLUMNS
    ) -> Verdict:
        """Judge one response. Raises UserError when the verifier says that the data is wrong, or
        cannot be started. columns: as in `WorkerPool.submit`.

        A reward that is not finite goes through: the update that it would spoil is skipped.
        """
        if self._search is not None and (complaint := self._search.look(response)) is not None:
            self.tell(complaint)
        outcome = await asyncio.wrap_future(self._pool.submit(prompt, response, answer, columns))
        if outcome.failure is not None:
            self.causes.setdefault(
                outcome.failure,
                f"{outcome.cause}, on the prompt {_shown(prompt)}, response {_shown(response)}",
            )
            return Verdict(0.0, 0.0, outcome.failure)
        scores = outcome.scores
        reward = sum(w * score for w, score in zip(self._weights, scores, strict=True))
        return Verdict(reward, float(scores[0] >= self.config.accuracy_at))

    def check_failures(self, failures: Sequence[str | None]) -> None:
        """Raise UserError when too many of these responses got no verdict: no run may train on
        that."""
        if not self.has_failed(failures):
            return
        [(most, _), *_] = (kinds := Counter(f for f in failures if f is not None)).most_common()
        limit = self.config.max_failed_fraction
        raise UserError(
            f"reward.verifier={', '.join(self.config.verifiers)} failed on {kinds.total()} of "
            f"{len(failures)} responses ({', '.join(f'{n} {k}' for k, n in kinds.items())}), and "
            f"reward.max_failed_fraction={limit:g}. The first: "
            f"{self.causes.get(most, 'it was before this run was resumed')}. Mend the verifier, or "
            f"raise reward.timeout_s={self.config.timeout_s:g} or "
            f"reward.memory_mib={self.config.memory_mib} if they are too low for it"
        )

    def has_failed(self, failures: Sequence[str | None]) -> bool:
        """Return whether the verifier failed on so many responses that it is to blame, not they."""
        share = sum(f is not None for f in failures) / max(len(failures), 1)
        return share == 1.0 or share > self.config.max_failed_fraction

    def close(self) -> None:
        """End the workers; verdicts that are being waited for are cancelled."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")

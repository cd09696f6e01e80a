"""Fills a rollout batch with groups that carry a signal (DAPO's dynamic sampling).

Prompts go out in rounds. Groups are admitted in prompt order, not in the order of completion, so
quick (short) responses have no better chance of being trained on. What is left over in the last
round is carried into the next batch, with the policy version that sampled it.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megafork.config import RolloutConfig
from megafork.data.prompts import Prompt, PromptStream
from megafork.data.tokenizer import Tokenizer
from megafork.errors import UserError
from megafork.rewards.overlong import overlong_punishment
from megafork.rewards.verifier import Judge
from megafork.rollout.client import RolloutClient
from megafork.rollout.journal import Journal, group_of
from megafork.rollout.sampling import Sampling
from megafork.types import Group, Sample


@dataclass
class RolloutBatch:
    groups: list[Group]
    """What is trained on, in prompt order."""
    generated: list[Group]
    """All groups generated for this batch, dropped ones included: the policy as it is."""
    num_dropped: int = 0
    num_replayed: int = 0
    """Generated groups that were in the journal already, from before an interruption."""
    reward_seconds: float = 0.0
    """Verifier time; it overlaps with generation."""


@dataclass
class Collector:
    client: RolloutClient
    prompts: PromptStream
    tokenizer: Tokenizer
    judge: Judge
    rollout: RolloutConfig
    sampling: Sampling
    journal_dir: Path
    carried: list[Group] = field(default_factory=list)
    _signal_rate: float = 1.0

    def state(self) -> dict[str, Any]:
        """What the next step's batch depends on, for a checkpoint; JSON can hold it."""
        return {
            "position": self.prompts.position,
            "signal_rate": self._signal_rate,
            "carried": [asdict(group) for group in self.carried],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.prompts.position = state["position"]
        self._signal_rate = state["signal_rate"]
        self.carried = [group_of(fields) for fields in state["carried"]]

    async def collect(self, step: int, policy_version: int) -> RolloutBatch:
        """The batch of a step. Raises UserError when too few groups carry a signal.

        Given up at any moment, it can be called again: what is in the journal is not lost.
        """
        before = self.prompts.position, self._signal_rate, self.carried
        try:
            return await self._collect(step, policy_version)
        except BaseException:
            self.prompts.position, self._signal_rate, self.carried = before
            raise

    async def _collect(self, step: int, policy_version: int) -> RolloutBatch:
        wanted = self.rollout.prompts_per_step
        batch = RolloutBatch(groups=[], generated=[])
        oldest = policy_version - self.rollout.max_staleness
        admitted = [group for group in self.carried if group.policy_version >= oldest]
        path = self.journal_dir / f"step_{step:06d}.jsonl"
        finished = {group.prompt_index: group for group in Journal.read(path)}
        with Journal(path) as journal:
            async with self.client:
                for _ in range(self.rollout.max_sampling_rounds):
                    missing = wanted - len(admitted)
                    if missing <= 0:
                        break
                    prompts = self.prompts.take(math.ceil(missing / self._signal_rate))
                    replayed = [self._replay(finished, prompt, path) for prompt in prompts]
                    batch.num_replayed += sum(group is not None for group in replayed)
                    generated = await asyncio.gather(
                        *(
                            self._generate(prompt, policy_version, journal, batch)
                            for prompt, group in zip(prompts, replayed, strict=True)
                            if group is None
                        )
                    )
                    new = iter(generated)
                    groups = [group or next(new) for group in replayed]
                    admitted = admitted + self._admissible(groups, batch)
        if len(admitted) < wanted:
            raise UserError(
                f"after rollout.max_sampling_rounds={self.rollout.max_sampling_rounds} rounds only "
                f"{len(admitted)} of rollout.prompts_per_step={wanted} groups had both right and "
                f"wrong responses ({batch.num_dropped} were dropped): use prompts of another "
                "difficulty, a larger rollout.group_size, or rollout.dynamic_sampling=false"
            )
        batch.groups = admitted[:wanted]
        surplus = admitted[wanted:] if self.rollout.surplus == "carry" else []
        self.carried = [group for group in surplus if group.is_finite]
        return batch

    def _admissible(self, groups: list[Group], batch: RolloutBatch) -> list[Group]:
        batch.generated += groups
        if not self.rollout.dynamic_sampling:
            return groups
        admissible = [group for group in groups if group.has_signal or not group.is_finite]
        batch.num_dropped += len(groups) - len(admissible)
        # The next round asks for as many prompts as this step's share makes likely to be enough;
        # the share of a last, small round alone would be noise, and its surplus stale.
        self._signal_rate = max(0.1, 1.0 - batch.num_dropped / len(batch.generated))
        return admissible

    def _replay(self, finished: dict[int, Group], prompt: Prompt, path: Path) -> Group | None:
        """The prompt's group of an interrupted attempt at this step, if it was finished."""
        group = finished.get(prompt.index)
        if group is None:
            return None
        if group.prompt_ids != prompt.ids or len(group.samples) != self.rollout.group_size:
            raise UserError(
                f"{path}: the group of prompt {prompt.index} was generated from another prompt or "
                "with another rollout.group_size: resume with the run's own data and group size, "
                "or delete the file to generate the step's groups again"
            )
        if not group.is_finite:  # the verifier may have been mended meanwhile
            group = replace(group, samples=[self._judged(prompt, s) for s in group.samples])
        return group

    def _judged(self, prompt: Prompt, sample: Sample) -> Sample:
        text = self.tokenizer.decode(sample.token_ids)
        reward, accuracy = self.judge(prompt.text, text, prompt.answer)
        reward -= overlong_punishment(
            len(sample.token_ids),
            self.judge.config,
            max_response_tokens=self.rollout.max_response_tokens,
        )
        return replace(sample, reward=reward, accuracy=accuracy)

    async def _generate(
        self, prompt: Prompt, policy_version: int, journal: Journal, batch: RolloutBatch
    ) -> Group:
        size = self.rollout.group_size
        completions = await self.client.generate(
            prompt.ids, size, self.sampling, seed=self._seed(prompt)
        )
        started = time.monotonic()
        samples = [
            self._judged(
                prompt, Sample(prompt.index * size + i, c.token_ids, c.logprobs, c.truncated)
            )
            for i, c in enumerate(completions)
        ]
        batch.reward_seconds += time.monotonic() - started
        group = Group(prompt.index, prompt.ids, policy_version, samples)
        journal.append(group)
        return group

    def _seed(self, prompt: Prompt) -> int | None:
        """A seed of the prompt alone; response i of the group takes seed + i."""
        if not self.rollout.seeded:
            return None
        return (self.prompts.seed * 1_000_003 + prompt.index) * self.rollout.group_size

"""Fills a rollout batch with groups that carry a signal (DAPO's dynamic sampling).

Prompts go out in rounds. With rollout.tail = "wait" groups are admitted in prompt order, not in the
order of completion, so quick (short) responses have no better chance of being trained on. "abort"
and "carry" stop waiting when the batch is full: what was quick is trained on now, and the rest
never, or later. Admissible groups beyond the batch are carried into the next one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
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
from megafork.rollout.fleet import Fleet
from megafork.rollout.journal import Journal, group_of
from megafork.rollout.sampling import Completion, Sampling
from megafork.types import Group, Sample


@dataclass
class RolloutBatch:
    groups: list[Group] = field(default_factory=list)
    """What is trained on, in prompt order."""
    generated: list[Group] = field(default_factory=list)
    """All groups finished for this batch, dropped ones included: the policy as it is."""
    num_dropped: int = 0
    """Without a signal"""
    num_stale: int = 0
    """With a token older than rollout.max_policy_lag allows"""
    num_replayed: int = 0
    """Generated groups that were in the journal already, from before an interruption."""
    num_tail: int = 0
    """Groups that a full batch did not wait for: aborted, or carried on unfinished"""
    lost_lengths: list[int] = field(default_factory=list)
    """Tokens of each response that was begun and is in no batch: aborted, or too old"""
    seconds: float = 0.0
    """From the first request until the batch was full; it may overlap with training."""
    reward_seconds: float = 0.0
    """Verifier time; it overlaps with generation."""
    state: dict[str, Any] = field(default_factory=dict)
    """The collector's when the batch was full, for a checkpoint"""


@dataclass
class Collector:
    client: RolloutClient | Fleet
    prompts: PromptStream
    tokenizer: Tokenizer
    judge: Judge
    rollout: RolloutConfig
    sampling: Sampling
    journal_dir: Path
    carried: list[Group] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Prompts whose groups a full batch did not wait for (rollout.tail = "carry")"""
    _running: dict[int, asyncio.Task[tuple[Group, float]]] = field(default_factory=dict)
    """Of each prompt that was asked for: its group, and the seconds of its verifier"""
    _signal_rate: float = 1.0

    def state(self) -> dict[str, Any]:
        """What the next step's batch depends on, for a checkpoint; JSON can hold it."""
        return {
            "position": self.prompts.position,
            "signal_rate": self._signal_rate,
            "carried": [asdict(group) for group in self.carried],
            "pending": list(self.pending),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.prompts.position = state["position"]
        self._signal_rate = state["signal_rate"]
        self.carried = [group_of(fields) for fields in state["carried"]]
        self.pending = list(state["pending"])

    async def collect(self, step: int, trained_by: int) -> RolloutBatch:
        """The batch of a step. Raises UserError when too few groups carry a signal.

        trained_by: the policy version that will train on it; the server may have an older one.
        Given up at any moment, it can be called again: what is in the journal is not lost.
        """
        before = self.prompts.position, self._signal_rate, self.carried, self.pending
        try:
            return await self._collect(step, trained_by)
        except BaseException:
            self.prompts.position, self._signal_rate, self.carried, self.pending = before
            await self.cancel_running()
            raise

    async def _collect(self, step: int, trained_by: int) -> RolloutBatch:
        started = time.monotonic()
        wanted, oldest = self.rollout.prompts_per_step, trained_by - self.rollout.max_policy_lag
        batch = RolloutBatch()
        admitted = self._recent(self.carried, oldest, batch)
        path = self.journal_dir / f"step_{step:06d}.jsonl"
        known = await self._mended({g.prompt_index: g for g in Journal.read(path)}, path)
        with Journal(path) as journal:
            async with self.client:
                for _ in range(self.rollout.max_sampling_rounds):
                    missing = wanted - len(admitted)
                    if missing <= 0:
                        break
                    prompts = self._next_prompts(missing)
                    replayed = [await self._replay(known, prompt, path) for prompt in prompts]
                    found = [group for group in replayed if group is not None]
                    groups = [group for group in found if group.is_whole]
                    batch.num_replayed += len(groups)
                    aborted = [group for group in found if not group.is_whole]
                    groups += await self._finish(
                        prompts, groups, aborted, missing, oldest, journal, batch
                    )
                    groups.sort(key=lambda group: group.prompt_index)
                    batch.generated += groups
                    self.judge.check_failures(_failures(batch.generated))
                    admitted = admitted + self._admissible(groups, oldest, batch)
        if len(admitted) < wanted:
            raise UserError(
                f"after rollout.max_sampling_rounds={self.rollout.max_sampling_rounds} rounds only "
                f"{len(admitted)} of rollout.prompts_per_step={wanted} groups had both right and "
                f"wrong responses ({batch.num_dropped} were dropped, {batch.num_stale} were too "
                "old): use prompts of another difficulty, a larger rollout.group_size, or "
                "rollout.dynamic_sampling=false"
            )
        batch.groups = admitted[:wanted]
        surplus = admitted[wanted:] if self.rollout.surplus == "carry" else []
        self.carried = [group for group in surplus if group.is_finite]
        batch.state = self.state()
        batch.seconds = time.monotonic() - started
        return batch

    def _next_prompts(self, missing: int) -> list[Prompt]:
        """Those that are pending, and as many more as are likely to fill the batch."""
        count = math.ceil(missing / self._signal_rate * self.rollout.oversampling)
        pending = [self.prompts.at(index) for index in self.pending]
        self.pending = []
        return pending + self.prompts.take(max(0, count - len(pending)))

    async def _finish(
        self,
        prompts: Sequence[Prompt],
        replayed: Sequence[Group],
        aborted: Sequence[Group],
        missing: int,
        oldest: int,
        journal: Journal,
        batch: RolloutBatch,
    ) -> list[Group]:
        """Groups of those prompts that have none yet, all or until the batch is full."""
        have = {group.prompt_index for group in replayed}
        left = [prompt for prompt in prompts if prompt.index not in have]
        num_admissible = sum(self._is_admissible(group, oldest) for group in replayed)
        waits = self.rollout.tail == "wait"
        if num_admissible >= missing and not waits:  # so it was when this was journalled
            self._leave(left, batch)
            self._lose(aborted, batch)
            return []
        for prompt in left:
            if prompt.index not in self._running:
                self._running[prompt.index] = asyncio.create_task(self._generate(prompt))
        groups: list[Group] = []
        for ended in asyncio.as_completed([self._running[prompt.index] for prompt in left]):
            group, reward_seconds = await ended
            if not group.is_whole:
                raise UserError(
                    f"the rollout server at {self.client.url} aborted responses that nobody asked "
                    "it to: was it told to end, or does another client use it?"
                )
            groups.append(self._take(group, reward_seconds, journal, batch))
            num_admissible += self._is_admissible(group, oldest)
            if num_admissible >= missing and not waits:
                break
        have = {group.prompt_index for group in groups}
        tail = [prompt for prompt in left if prompt.index not in have]
        if tail and self.rollout.tail == "abort":
            groups += await self._abort(tail, journal, batch)
        elif tail:
            self._leave(tail, batch)
        return groups

    def _take(
        self, group: Group, reward_seconds: float, journal: Journal, batch: RolloutBatch
    ) -> Group:
        del self._running[group.prompt_index]
        batch.reward_seconds += reward_seconds
        journal.append(group)
        return group

    def _lose(self, groups: Iterable[Group], batch: RolloutBatch) -> None:
        lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
        batch.lost_lengths += [length for length in lengths if length]

    def _leave(self, tail: Sequence[Prompt], batch: RolloutBatch) -> None:
        batch.num_tail += len(tail)
        if self.rollout.tail == "carry":
            self.pending += [prompt.index for prompt in tail]

    async def _abort(
        self, tail: Sequence[Prompt], journal: Journal, batch: RolloutBatch
    ) -> list[Group]:
        """End what is still being generated; groups that were whole before that are as good."""
        left = {self._running[prompt.index]: prompt for prompt in tail}
        while left:  # an abort that overtakes its request is lost
            await self.client.abort([_request_id(prompt) for prompt in left.values()])
            _, running = await asyncio.wait(left, timeout=1.0)
            left = {task: left[task] for task in running}
        answers = [self._running[prompt.index].result() for prompt in tail]
        groups = [self._take(*answer, journal, batch) for answer in answers]
        aborted = [group for group in groups if not group.is_whole]
        batch.num_tail += len(aborted)
        self._lose(aborted, batch)
        return [group for group in groups if group.is_whole]

    def _is_admissible(self, group: Group, oldest: int) -> bool:
        """One that is not finite is told of later, and so that nobody samples on for ever."""
        has_signal = group.has_signal or not group.is_finite or not self.rollout.dynamic_sampling
        return has_signal and group.policy_version >= oldest

    def _admissible(self, groups: list[Group], oldest: int, batch: RolloutBatch) -> list[Group]:
        with_signal = groups
        if self.rollout.dynamic_sampling:
            with_signal = [group for group in groups if group.has_signal or not group.is_finite]
            batch.num_dropped += len(groups) - len(with_signal)
            # The next round asks for as many prompts as this step's share makes likely to be
            # enough; the share of a last, small round alone would be noise, and its surplus stale.
            self._signal_rate = max(0.1, 1.0 - batch.num_dropped / max(len(batch.generated), 1))
        return self._recent(with_signal, oldest, batch)

    def _recent(self, groups: Iterable[Group], oldest: int, batch: RolloutBatch) -> list[Group]:
        groups = list(groups)
        recent = [group for group in groups if group.policy_version >= oldest]
        batch.num_stale += len(groups) - len(recent)
        self._lose((group for group in groups if group.policy_version < oldest), batch)
        return recent

    async def cancel_running(self) -> None:
        """End the requests that a call left unfinished; pending prompts will be asked again."""
        running = list(self._running.values())
        self._running.clear()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _replay(self, known: dict[int, Group], prompt: Prompt, path: Path) -> Group | None:
        """The prompt's group of an interrupted attempt at this step, if it ended there."""
        group = known.get(prompt.index)
        if group is None:
            return None
        if group.prompt_ids != prompt.ids or len(group.samples) != self.rollout.group_size:
            raise UserError(
                f"{path}: the group of prompt {prompt.index} was generated from another prompt or "
                "with another rollout.group_size: resume with the run's own data and group size, "
                "or delete the file to generate the step's groups again"
            )
        if group.is_whole and not group.is_finite:  # the verifier may have been mended meanwhile
            group = replace(group, samples=await self._judged(prompt, group.samples))
        return group

    async def _mended(self, known: dict[int, Group], path: Path) -> dict[int, Group]:
        """The journalled groups; where the run ended for their failed verdicts, with new ones."""
        if not self.judge.has_failed(_failures(known.values())):
            return known
        with Journal(path) as journal:
            for index, group in known.items():
                if any(_failures([group])):
                    samples = await self._judged(self.prompts.at(index), group.samples)
                    known[index] = replace(group, samples=samples)
                    journal.append(known[index])
        return known

    async def _judged(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Sample]:
        return await asyncio.gather(*(self._judged_one(prompt, sample) for sample in samples))

    async def _judged_one(self, prompt: Prompt, sample: Sample) -> Sample:
        text = self.tokenizer.decode(sample.token_ids)
        verdict = await self.judge(prompt.text, text, prompt.answer)
        reward = verdict.reward - overlong_punishment(
            len(sample.token_ids),
            self.judge.config,
            max_response_tokens=self.rollout.max_response_tokens,
        )
        return replace(sample, reward=reward, accuracy=verdict.accuracy, failure=verdict.failure)

    async def _generate(self, prompt: Prompt) -> tuple[Group, float]:
        size = self.rollout.group_size
        async with self.client:  # it may outlive the call that asked for it
            completions = await self.client.generate(
                prompt.ids,
                size,
                self.sampling,
                seed=self._seed(prompt),
                request_id=_request_id(prompt),
            )
        started = time.monotonic()
        version = min(c.versions[0][0] if c.versions else self.client.version for c in completions)
        samples = [_sample(prompt.index * size + i, c, version) for i, c in enumerate(completions)]
        is_whole = not any(completion.aborted for completion in completions)
        if is_whole:
            samples = await self._judged(prompt, samples)
        group = Group(prompt.index, prompt.ids, version, samples, is_whole)
        return group, time.monotonic() - started

    def _seed(self, prompt: Prompt) -> int | None:
        """A seed of the prompt alone; response i of the group takes seed + i."""
        if not self.rollout.seeded:
            return None
        return (self.prompts.seed * 1_000_003 + prompt.index) * self.rollout.group_size


def _failures(groups: Iterable[Group]) -> list[str | None]:
    """Of each judged response: why there is no verdict, if so."""
    return [sample.failure for group in groups if group.is_whole for sample in group.samples]


def _request_id(prompt: Prompt) -> str:
    return f"prompt-{prompt.index}"


def _sample(uid: int, completion: Completion, oldest: int) -> Sample:
    """Not yet judged. oldest: the group's policy version, from which the changes count."""
    changes, before = [], oldest
    for version, first in completion.versions:
        changes += [first] * (version - before)
        before = version
    return Sample(
        uid,
        completion.token_ids,
        completion.logprobs,
        completion.truncated,
        version_changes=changes,
    )

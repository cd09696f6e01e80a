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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from megafork.config import RolloutConfig
from megafork.data.prompts import Prompt, PromptStream
from megafork.data.sample import Group, version_runs
from megafork.errors import UserError
from megafork.rollout.fleet import Fleet
from megafork.rollout.judging import Judging
from megafork.rollout.messages import Pieces
from megafork.rollout.sampling import Sampling
from megafork.rollout.step_journals import StepJournals
from megafork.rollout.tally import Tally

T = TypeVar("T")
_DISK = ThreadPoolExecutor(1, thread_name_prefix="journal")
"""A thread of its own: what waits for a disk must not wait for what reads data or decodes"""


@dataclass
class RolloutBatch:
    groups: list[Group] = field(default_factory=list)
    """What is trained on, in prompt order."""
    generated: list[Group] = field(default_factory=list)
    """All groups finished for this batch, dropped ones included: the policy as it is. Those that
    nobody will train on are without their tokens."""
    num_dropped: int = 0
    """Groups without a signal"""
    num_stale: int = 0
    """Groups with a token older than rollout.max_policy_lag allows"""
    num_replayed: int = 0
    """Generated groups that were in the journal already, from before an interruption."""
    num_tail: int = 0
    """Groups that a full batch did not wait for: aborted, or carried on unfinished"""
    lost_lengths: list[int] = field(default_factory=list)
    """Tokens of each response that was begun and is in no batch: aborted, or too old"""
    num_generated_tokens: int = 0
    """Tokens of groups that were aborted count too, those that the journal had do not"""
    seconds: float = 0.0
    """From the first request until the batch was full; it may overlap with training."""
    reward_seconds: float = 0.0
    """Verifier time; it overlaps with generation."""
    state: dict[str, Any] = field(default_factory=dict)
    """The collector's state when the batch was full, for a checkpoint"""

    def rows(self, uids: Sequence[int]) -> Pieces:
        """Make the message with the rows of these samples, in this order.

        token_ids int32 [R], logprobs float32 [R], and runs int32 [2 * runs]: for each sample in
        turn pairs of a policy version and the number of tokens that it sampled. Raises KeyError for
        a sample that the batch has not.
        """
        found = {sample.uid: (group, sample) for group in self.groups for sample in group.samples}
        wanted = [found[uid] for uid in uids]
        runs = [
            run
            for group, sample in wanted
            for run in version_runs(sample.versions, group.policy_version, sample.num_tokens)
        ]
        return {
            "token_ids": [np.empty(0, np.int32), *(sample.token_ids for _, sample in wanted)],
            "logprobs": [np.empty(0, np.float32), *(sample.logprobs for _, sample in wanted)],
            "runs": [np.array(runs, np.int32).reshape(-1)],
        }


@dataclass
class Collector:
    fleet: Fleet
    prompts: PromptStream
    judging: Judging
    journals: StepJournals
    rollout: RolloutConfig
    sampling: Sampling
    tally: Tally = field(default_factory=Tally)
    """The progress of the batch that is being filled, or was last"""
    carried: list[Group] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Prompts whose groups a full batch did not wait for (rollout.tail = "carry")"""
    _running: dict[int, asyncio.Task[tuple[Group, float]]] = field(default_factory=dict)
    """By the prompt that was asked for: its group, and the seconds of its verifier"""
    _references: list[tuple[int, int]] = field(default_factory=list)
    """Groups that were carried when the run was saved: prompt index, and step of the journal"""
    _signal_rate: float = 1.0

    def state(self) -> dict[str, Any]:
        """Return all that the next step's batch depends on, for a checkpoint; JSON can hold it."""
        return {
            "position": self.prompts.position,
            "signal_rate": self._signal_rate,
            "carried": self._references + [(g.prompt_index, g.step) for g in self.carried],
            "pending": list(self.pending),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.prompts.position = state["position"]
        self._signal_rate = state["signal_rate"]
        self.carried = []
        if any(isinstance(carried, dict) for carried in state["carried"]):
            raise UserError(
                "the checkpoint's carried groups are in it, and not in the journal: it is of an "
                "older version. Resume from one without any (rollout.max_policy_lag=0 has none), "
                "or with the version that wrote it"
            )
        self._references = [(index, step) for index, step in state["carried"]]
        self.pending = list(state["pending"])

    async def collect(self, step: int, trained_by: int) -> RolloutBatch:
        """Fill the batch of a step. Raises UserError when too few groups carry a signal.

        trained_by: the policy version that will train on it; the server may have an older one.
        Given up at any moment, it can be called again: what is in the journal is not lost.
        """
        before = self.state()
        try:
            return await self._collect(step, trained_by)
        except BaseException:
            self.restore(before)
            await self.cancel_running()
            raise

    async def _collect(self, step: int, trained_by: int) -> RolloutBatch:
        started = time.monotonic()
        wanted, oldest = self.rollout.prompts_per_step, trained_by - self.rollout.max_policy_lag
        batch, self.tally = RolloutBatch(), Tally()
        references, self._references = self._references, []
        self.carried += await _off_loop(self.journals.find, references)
        admitted = self._recent(self.carried, oldest, batch)
        known = await self._begin(step)
        for _ in range(self.rollout.max_sampling_rounds):
            missing = wanted - len(admitted)
            if missing <= 0:
                break
            prompts = self._next_prompts(missing)
            replayed = [await self._replay(known, prompt, step) for prompt in prompts]
            found = [group for group in replayed if group is not None]
            groups = [self._as_needed(group, oldest) for group in found if group.is_whole]
            batch.num_replayed += len(groups)
            aborted = [group for group in found if not group.is_whole]
            groups += await self._finish(prompts, groups, aborted, missing, oldest, step, batch)
            groups.sort(key=lambda group: group.prompt_index)
            batch.generated += groups
            self.judging.judge.check_failures(_failures(batch.generated))
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
        kept = {group.prompt_index for group in batch.groups + self.carried}
        batch.generated = [
            group if group.prompt_index in kept else group.without_tokens()
            for group in batch.generated
        ]
        batch.state = self.state()
        batch.num_generated_tokens = self.tally.tokens
        batch.seconds = time.monotonic() - started
        return batch

    async def _begin(self, step: int) -> dict[int, Group]:
        """Open the step's journal. Returns its groups that can be replayed.

        They are those of prompts from the stream's position on, and of pending ones: a journal of
        an attempt that went otherwise may also hold groups that are carried, or that an earlier
        step trains on. Groups are judged again where the run ended for their failed verdicts.
        """
        position = self.prompts.position
        awaited = {index for index in self.pending if index not in self._running}
        known = await _off_loop(
            self.journals.open, step, lambda index: index >= position or index in awaited
        )
        if self.judging.judge.has_failed(_failures(known.values())):
            for index, group in known.items():
                if any(_failures([group])):
                    known[index] = await self._judge_again(group, step)
        return known

    async def _judge_again(self, group: Group, step: int) -> Group:
        prompt = self.prompts.at(group.prompt_index)
        group = replace(group, samples=await self.judging(prompt, group.samples))
        await _off_loop(self.journals.append, group, step)
        return group

    def _next_prompts(self, missing: int) -> list[Prompt]:
        """Take the pending prompts, and as many more as are likely to fill the batch."""
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
        step: int,
        batch: RolloutBatch,
    ) -> list[Group]:
        """Generate for the prompts that have no group yet, for all or until the batch is full."""
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
        self.tally.groups += len(left)
        for ended in asyncio.as_completed([self._running[prompt.index] for prompt in left]):
            group, reward_seconds = await ended
            if not group.is_whole:
                raise UserError(
                    f"the rollout server at {self.fleet.url} aborted responses that nobody asked "
                    "it to: was it told to end, or does another client use it?"
                )
            group = await self._take(group, reward_seconds, step, batch)
            groups.append(self._as_needed(group, oldest))
            num_admissible += self._is_admissible(group, oldest)
            if num_admissible >= missing and not waits:
                break
        have = {group.prompt_index for group in groups}
        tail = [prompt for prompt in left if prompt.index not in have]
        if tail and self.rollout.tail == "abort":
            ended_before = await self._abort(tail, step, batch)
            groups += [self._as_needed(group, oldest) for group in ended_before]
        elif tail:
            self._leave(tail, batch)
        return groups

    async def _take(
        self, group: Group, reward_seconds: float, step: int, batch: RolloutBatch
    ) -> Group:
        """Count a finished group and write it to the step's journal."""
        del self._running[group.prompt_index]
        batch.reward_seconds += reward_seconds
        self.tally.add(sum(sample.num_tokens for sample in group.samples))
        group = replace(group, step=step)
        await _off_loop(self.journals.append, group, step)
        return group

    def _as_needed(self, group: Group, oldest: int) -> Group:
        """Return the group, without its tokens where nobody will train on them."""
        return group if self._is_admissible(group, oldest) else group.without_tokens()

    def _lose(self, groups: Iterable[Group], batch: RolloutBatch) -> None:
        lengths = [sample.num_tokens for group in groups for sample in group.samples]
        batch.lost_lengths += [length for length in lengths if length]

    def _leave(self, tail: Sequence[Prompt], batch: RolloutBatch) -> None:
        batch.num_tail += len(tail)
        if self.rollout.tail == "carry":
            self.pending += [prompt.index for prompt in tail]

    async def _abort(self, tail: Sequence[Prompt], step: int, batch: RolloutBatch) -> list[Group]:
        """End what is still being generated; groups that were whole before that are as good."""
        left = {self._running[prompt.index]: prompt for prompt in tail}
        while left:  # an abort that overtakes its request is lost
            await self.fleet.abort([_request_id(prompt) for prompt in left.values()])
            _, running = await asyncio.wait(left, timeout=1.0)
            left = {task: left[task] for task in running}
        answers = [self._running[prompt.index].result() for prompt in tail]
        groups = [await self._take(*answer, step, batch) for answer in answers]
        aborted = [group for group in groups if not group.is_whole]
        batch.num_tail += len(aborted)
        self._lose(aborted, batch)
        return [group for group in groups if group.is_whole]

    def _is_admissible(self, group: Group, oldest: int) -> bool:
        """Return whether a group can be trained on.

        A group that is not finite counts: the ranks tell of it, and nobody samples on for ever.
        """
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

    async def _replay(self, known: dict[int, Group], prompt: Prompt, step: int) -> Group | None:
        """Return the prompt's group of an interrupted attempt at this step, if it had one."""
        group = known.pop(prompt.index, None)
        if group is None:
            return None
        if group.prompt_ids != prompt.ids or len(group.samples) != self.rollout.group_size:
            raise UserError(
                f"rollouts/step_{step:06d}* of the run: the group of prompt {prompt.index} "
                "was generated from another prompt or with another rollout.group_size: resume with "
                "the run's own data and group size, or delete the file to generate the step's "
                "groups again"
            )
        if group.is_whole and not group.is_finite:  # the verifier may have been mended meanwhile
            group = await self._judge_again(group, step)
        return group

    async def _generate(self, prompt: Prompt) -> tuple[Group, float]:
        """Ask for a prompt's responses and judge them. Returns the verifiers' seconds too.

        A group with an aborted response is not judged.
        """
        size = self.rollout.group_size
        answers = await self.fleet.generate(
            prompt.ids,
            size,
            self.sampling,
            seed=self._seed(prompt),
            request_id=_request_id(prompt),
        )
        version = min(s.versions[0][0] if s.versions else self.fleet.version for s in answers)
        samples = [replace(s, uid=prompt.index * size + i) for i, s in enumerate(answers)]
        is_whole = not any(sample.aborted for sample in samples)
        started = time.monotonic()
        if is_whole:
            samples = await self.judging(prompt, samples)
        group = Group(prompt.index, prompt.ids, version, samples, is_whole)
        return group, time.monotonic() - started

    def _seed(self, prompt: Prompt) -> int | None:
        """Return a seed that the prompt alone decides; response i of the group takes seed + i."""
        if not self.rollout.seeded:
            return None
        return (self.prompts.seed * 1_000_003 + prompt.index) * self.rollout.group_size


def _failures(groups: Iterable[Group]) -> list[str | None]:
    """Return why each judged response has no verdict; None where it has one."""
    return [sample.failure for group in groups if group.is_whole for sample in group.samples]


async def _off_loop(work: Callable[..., T], *arguments: Any) -> T:
    """Do what waits for a disk in a thread. Cancelled, this still waits for its end."""
    working = asyncio.get_running_loop().run_in_executor(_DISK, work, *arguments)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


def _request_id(prompt: Prompt) -> str:
    return f"prompt-{prompt.index}"

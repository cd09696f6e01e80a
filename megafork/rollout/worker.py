"""What one data-parallel replica does for a rollout batch, on its first rank: it asks the servers,
judges, journals, and keeps the tokens until they are trained on.

Rank 0's collector decides what is asked of which server and what is trained on, from lengths,
rewards and policy versions. Tokens come from the server to this rank and go to the ranks that train
on them; no rank sees more of a batch than its replica's share.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megafork.config import RolloutConfig
from megafork.data.prompts import Prompt
from megafork.data.tokenizer import Tokenizer
from megafork.errors import UserError
from megafork.rewards.overlong import overlong_punishment
from megafork.rewards.verifier import Judge
from megafork.rollout.client import Asker, RolloutClient
from megafork.rollout.journal import (
    Damage,
    Journal,
    journal_path,
    journalled_steps,
    read_step,
)
from megafork.rollout.sampling import UNANSWERED, Completion
from megafork.sample import Group, GroupSummary, Sample
from megafork.types import TokenTable

_log = logging.getLogger(__name__)


class Worker(Asker, Protocol):
    """A replica as the collector sees it: a `RolloutWorker`, here or elsewhere (rollout/remote.py).

    One that is cancelled can be called again.
    """

    async def judge(
        self, prompt: Prompt, name: str, policy_version: int, *, answered: bool
    ) -> tuple[GroupSummary, float]:
        """The group of what `ask` got for the request of that name, and its verifier's seconds.

        answered: whether anything was; a request that was aborted before makes a group without
        tokens. policy_version: that began to sample. An aborted group is not judged.
        """

    async def keep(self, prompt_index: int, step: int) -> None:
        """Write the group to the step's journal; it is on disk on return."""

    async def begin(self, step: int, position: int, pending: Sequence[int]) -> list[GroupSummary]:
        """Open the step's journal. Returns this replica's groups in it that can be replayed.

        Those of prompts from `position` on, and of `pending` ones: a journal of an attempt that
        went otherwise may hold what is carried, or trained on by an earlier step.
        """

    async def recall(self, references: Sequence[tuple[int, int]]) -> list[GroupSummary]:
        """Groups of earlier steps, each by its prompt's index and the step whose journal has it."""

    async def judge_again(self, prompt: Prompt, step: int) -> GroupSummary:
        """Of a group that `begin` told of; it is in the step's journal on return."""

    async def forget(self, prompt_indices: Sequence[int]) -> None:
        """Nobody will train on these."""


def replica_of(prompt_index: int, num_replicas: int) -> int:
    """Which replica a prompt is asked by."""
    return prompt_index % num_replicas


class RolloutWorker:
    """See `Worker`. `take_rows` and `batch` are the main thread's, the rest the event loop's."""

    def __init__(
        self,
        rollout: RolloutConfig,
        tokenizer: Tokenizer,
        verdict: Judge,
        journal_dir: Path,
        *,
        api_key: str,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self.rollout, self.tokenizer, self.verdict = rollout, tokenizer, verdict
        self.journal_dir, self.replica, self.num_replicas = journal_dir, replica, num_replicas
        self.batch: list[Group] = []
        """Of the step that is trained on"""
        self._api_key = api_key
        self._clients: dict[str, RolloutClient] = {}
        self._answers: dict[str, list[Completion]] = {}
        self._groups: dict[int, Group] = {}
        self._journal: Journal | None = None

    async def ask(self, url: str, body: dict[str, Any]) -> list[Completion]:
        if url not in self._clients:
            timeout_s = self.rollout.request_timeout_s
            self._clients[url] = RolloutClient(url, self._api_key, timeout_s=timeout_s)
        async with self._clients[url] as client:
            answer = await client.ask(body)
        self._answers[body["request_id"]] = answer
        return [replace(c, token_ids=c.token_ids[:0], logprobs=c.logprobs[:0]) for c in answer]

    async def judge(
        self, prompt: Prompt, name: str, policy_version: int, *, answered: bool
    ) -> tuple[GroupSummary, float]:
        started, size = time.monotonic(), self.rollout.group_size
        completions = self._answers.pop(name, None)
        if not answered:
            completions = [UNANSWERED] * size
        assert completions is not None
        samples = [
            Sample(
                prompt.index * size + i, c.token_ids, c.logprobs, c.truncated, versions=c.versions
            )
            for i, c in enumerate(completions)
        ]
        is_whole = not any(completion.aborted for completion in completions)
        if is_whole:
            samples = await self._judged(prompt, samples)
        group = Group(prompt.index, prompt.ids, policy_version, samples, is_whole)
        self._groups[prompt.index] = group
        return group.summary(self.replica), time.monotonic() - started

    async def keep(self, prompt_index: int, step: int) -> None:
        self._append(self._groups[prompt_index], step)

    async def begin(self, step: int, position: int, pending: Sequence[int]) -> list[GroupSummary]:
        awaited = set(pending)

        def is_wanted(index: int) -> bool:
            return self._is_ours(index) and (index >= position or index in awaited)

        damaged: list[Damage] = []
        found = read_step(self.journal_dir, step, is_wanted, damaged.append)
        for damage in damaged:
            index = damage.prompt_index
            if index is None or (is_wanted(index) and index not in found):
                self._refuse_or_tell(damage, step)
        self._open(step)
        self._groups |= found
        return [group.summary(self.replica, step) for group in found.values()]

    async def recall(self, references: Sequence[tuple[int, int]]) -> list[GroupSummary]:
        wanted = dict(references)
        for step in set(wanted.values()):
            indices = {index for index, origin in wanted.items() if origin == step}
            damaged: list[Damage] = []
            found = read_step(self.journal_dir, step, indices.__contains__, damaged.append)
            if missing := sorted(indices - found.keys()):
                raise UserError(
                    f"{journal_path(self.journal_dir, step)}: prompt {missing[0]}'s group, which "
                    "was carried over to a later step, is not in it (nor in those of other "
                    "replicas): bring the file back, or resume from a checkpoint before that step"
                    + "".join(f"\n  {damage}" for damage in damaged)
                )
            self._groups |= found
        return [self._groups[index].summary(self.replica, step) for index, step in references]

    async def judge_again(self, prompt: Prompt, step: int) -> GroupSummary:
        group = self._groups[prompt.index]
        group = replace(group, samples=await self._judged(prompt, group.samples))
        self._groups[prompt.index] = group
        self._append(group, step)
        return group.summary(self.replica, step)

    async def forget(self, prompt_indices: Sequence[int]) -> None:
        for index in prompt_indices:
            self._groups.pop(index, None)

    def take_rows(self, known: TokenTable) -> TokenTable:
        """The batch that is trained on now, with the rows of the groups that are here; once."""
        indices = [i for i in known.group_B.unique().tolist() if self._is_ours(i)]
        self.batch = [self._groups.pop(index) for index in indices]
        return known.with_tokens(self.batch)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _refuse_or_tell(self, damage: Damage, step: int) -> None:
        """Warn of the damage; raise UserError if a later step has a journal.

        The damaged step may have been trained then, and would be trained on other groups now.
        """
        if max(journalled_steps(self.journal_dir)) > step:
            raise UserError(
                f"{damage}, and step {step} may have been trained on what the file held: bring it "
                f"back from a copy, or delete the files of step {step} and of all later ones in "
                f"{self.journal_dir} to generate their groups again"
            )
        _log.warning("%s; it is generated again", damage)

    def _is_ours(self, prompt_index: int) -> bool:
        return replica_of(prompt_index, self.num_replicas) == self.replica

    def _open(self, step: int) -> None:
        self.close()
        self._journal = Journal(journal_path(self.journal_dir, step, self.replica))

    def _append(self, group: Group, step: int) -> None:
        assert self._journal is not None
        assert self._journal.path == journal_path(self.journal_dir, step, self.replica)
        self._journal.append(group)

    async def _judged(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Sample]:
        return await asyncio.gather(*(self._judged_one(prompt, sample) for sample in samples))

    async def _judged_one(self, prompt: Prompt, sample: Sample) -> Sample:
        text = self.tokenizer.decode(sample.token_ids)
        verdict = await self.verdict(prompt.text, text, prompt.answer)
        reward = verdict.reward - overlong_punishment(
            len(sample.token_ids),
            self.verdict.config,
            max_response_tokens=self.rollout.max_response_tokens,
        )
        return replace(sample, reward=reward, accuracy=verdict.accuracy, failure=verdict.failure)

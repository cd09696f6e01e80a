"""Generates for a run: batches in order, some of them ahead; probes; evaluations.

Imports no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafork.config import TrainConfig
from megafork.controller.run_log import RunLog
from megafork.data.prompts import Prompt, PromptStream, encode_rows, read_both
from megafork.data.sample import Group, Sample
from megafork.data.tokenizer import Tokenizer, load_tokenizer
from megafork.data.unchanged import identity
from megafork.evaluation import heldout
from megafork.model.shape import ModelShape
from megafork.rollout.collector import Collector, RolloutBatch
from megafork.rollout.ends import stop_token_ids
from megafork.rollout.fleet import Fleet
from megafork.rollout.judging import Judging
from megafork.rollout.sampling import Sampling
from megafork.rollout.step_journals import StepJournals
from megafork.rollout.tally import Tally
from megafork.verifiers.names import columns_of


@dataclass(frozen=True)
class Inputs:
    """Data and tokenizer, which a run reads before it generates."""

    tokenizer: Tokenizer
    sampling: Sampling
    prompts: list[Prompt]
    heldout: list[Prompt]
    data: dict[str, Any]
    """What a checkpoint keeps of the data"""

    @classmethod
    def read(cls, config: TrainConfig) -> Inputs:
        """Read them. Raises UserError for data or a tokenizer that cannot be read."""
        chat, thinking = config.data.chat_template, config.data.enable_thinking
        tokenizer = load_tokenizer(config, chat_template=chat, enable_thinking=thinking)
        shape = ModelShape.from_folder(config.model.path)
        sampling = Sampling(
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_response_tokens,
            stop_token_ids=stop_token_ids(shape, tokenizer),
        )
        rows, held_out = read_both(config.data, columns_of(config.reward.verifiers))
        rows, prompts = encode_rows(rows, config.data, tokenizer.encode_prompt)
        held_out, found = encode_rows(held_out, config.data, tokenizer.encode_prompt)
        data = identity(config.data, rows, held_out)
        return cls(tokenizer, sampling, prompts, found[: config.eval.prompts], data)


class Generation:
    """Generates batches, probes and evaluations with the run's servers and verifiers.

    With rollout.max_policy_lag = n the batches of the n steps after the one that is asked for are
    generated meanwhile, one after the other. Whatever fails or is given up can be asked for again.
    Close it.
    """

    def __init__(
        self, config: TrainConfig, inputs: Inputs, fleet: Fleet, judging: Judging, log: RunLog
    ) -> None:
        self.config, self.inputs, self.fleet, self.log = config, inputs, fleet, log
        self.judging = judging
        self.collector = Collector(
            fleet=fleet,
            prompts=PromptStream(inputs.prompts, config.data.seed),
            judging=judging,
            journals=StepJournals(Path(config.run.dir) / "rollouts"),
            rollout=config.rollout,
            sampling=inputs.sampling,
        )
        # One at least for each server: they are asked in turn.
        self._probed = inputs.prompts[: max(config.sync.check_prompts, len(fleet.clients))]
        self._ahead: dict[int, asyncio.Task[RolloutBatch]] = {}
        self._state = self.collector.state()
        """The collector's state when the newest batch was full"""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self._state = state
        self.collector.restore(state)

    def close(self) -> None:
        self.collector.journals.close()

    async def batch(self, step: int, policy_version: int) -> RolloutBatch:
        """Return the batch that the policy version trains on in `step`."""
        self._begin(step, 0, policy_version)
        async with self.log.telling(f"step {step:>4}", lambda: self.collector.tally):
            batch = await self._ahead[step]
        self.log.failures(self.judging.judge.causes)
        self._state = batch.state
        last = self.config.training.steps
        if step == last:  # nobody waits for its tail
            await self.collector.cancel_running()
        del self._ahead[step]
        rollout = self.config.rollout
        carries = rollout.tail == "carry"  # one version of the lag is then the tail's
        for lag in range(1, rollout.max_policy_lag - carries + 1):
            if step + lag <= last:
                self._begin(step + lag, lag, policy_version)
        return batch

    def _begin(self, step: int, lag: int, policy_version: int) -> None:
        """Begin with a step's batch, after those of the steps before it, unless it has begun."""
        if step not in self._ahead:
            collecting = self._collected(self._ahead.get(step - 1), step, policy_version + lag)
            self._ahead[step] = asyncio.create_task(collecting)

    async def _collected(
        self, before: asyncio.Task[RolloutBatch] | None, step: int, trained_by: int
    ) -> RolloutBatch:
        if before is not None:
            await asyncio.shield(before)
        return await self.collector.collect(step, trained_by)

    async def give_up(self) -> None:
        """End all that is being generated; what batches have so far is in the journal."""
        tasks = list(self._ahead.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._ahead.clear()
        await self.collector.cancel_running()
        self.collector.restore(self._state)

    async def probe(self) -> list[Group]:
        """Sample one response to each of a few prompts, as the servers do now."""
        answers = await asyncio.gather(
            *(self.fleet.generate(p.ids, 1, self.inputs.sampling) for p in self._probed)
        )
        return [
            Group(p.index, p.ids, 0, [Sample(i, c.token_ids, c.logprobs, c.truncated)])
            for i, (p, [c]) in enumerate(zip(self._probed, answers, strict=True))
        ]

    async def evaluate(self, step: int) -> float:
        """Return the held-out accuracy (avg@k), which eval.jsonl gets too, with more."""
        config, prompts = self.config.eval, self.inputs.heldout
        tally = Tally(groups=len(prompts))
        async with self.log.telling(f"step {step:>4}  evaluation", lambda: tally):
            found = await heldout.sample(
                self.fleet,
                prompts,
                self.judging,
                replace(self.inputs.sampling, temperature=config.temperature),
                config.samples,
                self.config.rollout.max_num_seqs * len(self.fleet.clients),
                tally,
            )
        row = heldout.row(found)
        self.log.failures(self.judging.judge.causes)
        self.log.metrics.evaluation(step, row)
        return row["eval/accuracy"]


def probe_message(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Return a probe's groups, of one response each, as part of a header and arrays."""
    samples = [group.samples[0] for group in groups]
    described = [
        {"prompt_ids": list(group.prompt_ids), "num_tokens": s.num_tokens, "truncated": s.truncated}
        for group, s in zip(groups, samples, strict=True)
    ]
    return described, {
        "probe_token_ids": [sample.token_ids for sample in samples],
        "probe_logprobs": [sample.logprobs for sample in samples],
    }

"""Accuracy on held-out prompts, with the rollout server generating."""

from __future__ import annotations

import asyncio
from itertools import chain

from megafork.data.prompts import Prompt
from megafork.data.tokenizer import Tokenizer
from megafork.rewards.verifier import Judge, Verdict
from megafork.rollout.client import RolloutClient
from megafork.rollout.sampling import Sampling


async def accuracy(
    client: RolloutClient,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    judge: Judge,
    sampling: Sampling,
    num_samples: int,
) -> float:
    """Mean accuracy over prompts and `num_samples` responses each (avg@k).

    Raises UserError when the verifier failed on too many of them.
    """

    async def of_prompt(prompt: Prompt) -> list[Verdict]:
        completions = await client.generate(prompt.ids, num_samples, sampling)
        texts = [tokenizer.decode(completion.token_ids) for completion in completions]
        verdicts = [judge(prompt.text, text, prompt.answer) for text in texts]
        return await asyncio.gather(*verdicts)

    async with client:
        verdicts = list(chain.from_iterable(await asyncio.gather(*map(of_prompt, prompts))))
    judge.check_failures([verdict.failure for verdict in verdicts])
    return sum(verdict.accuracy for verdict in verdicts) / len(verdicts)

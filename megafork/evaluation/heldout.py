"""Accuracy on held-out prompts, with the rollout server generating."""

from __future__ import annotations

import asyncio

from megafork.data.prompts import Prompt
from megafork.data.tokenizer import Tokenizer
from megafork.rewards.verifier import Judge
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
    """Mean accuracy over prompts and `num_samples` responses each (avg@k)."""

    async def of_prompt(prompt: Prompt) -> float:
        completions = await client.generate(prompt.ids, num_samples, sampling)
        texts = [tokenizer.decode(completion.token_ids) for completion in completions]
        verdicts = [judge(prompt.text, text, prompt.answer) for text in texts]
        right = [verdict.accuracy for verdict in await asyncio.gather(*verdicts)]
        return sum(right) / len(right)

    async with client:
        values = await asyncio.gather(*map(of_prompt, prompts))
    return sum(values) / len(values)

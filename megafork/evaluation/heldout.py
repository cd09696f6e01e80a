"""Evaluation during training, on held-out prompts, with the run's own rollout server."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from megafork.data.prompts import Prompt
from megafork.evaluation import estimates
from megafork.evaluation.generation import for_each, groups_at_once
from megafork.rollout.fleet import Fleet
from megafork.rollout.judging import Judging
from megafork.rollout.sampling import Sampling
from megafork.rollout.tally import Tally


async def sample(
    fleet: Fleet,
    prompts: list[Prompt],
    judging: Judging,
    sampling: Sampling,
    num_samples: int,
    max_num_seqs: int,
    tally: Tally,
) -> estimates.Judged:
    """`num_samples` responses to each prompt, judged, in the prompts' order.

    Raises UserError when the verifier failed on too many of them.
    """
    found: dict[int, list[tuple[float, None, int, bool]]] = {}
    failures: list[str | None] = []

    async def of_prompt(prompt: Prompt) -> None:
        samples = await fleet.generate(prompt.ids, num_samples, sampling)
        verdicts = await asyncio.gather(
            *(judging.verdict(prompt, sample.token_ids) for sample in samples)
        )
        tally.add(sum(sample.num_tokens for sample in samples))
        failures.extend(verdict.failure for verdict in verdicts)
        found[prompt.index] = [
            (verdict.accuracy, None, sample.num_tokens, sample.truncated)
            for verdict, sample in zip(verdicts, samples, strict=True)
        ]

    await for_each(prompts, of_prompt, groups_at_once(max_num_seqs, num_samples))
    judging.judge.check_failures(failures)
    ordered = itertools.chain.from_iterable(found[prompt.index] for prompt in prompts)
    return estimates.Judged.of(ordered, num_samples)


def row(judged: estimates.Judged) -> dict[str, Any]:
    """The row of eval.jsonl; eval/accuracy is avg@k, eval/samples counts all responses."""
    problems, samples = judged.accuracy.shape
    accuracy = estimates.avg_at_k(judged)
    found: dict[str, Any] = {
        "eval/accuracy": accuracy.value,
        "eval/accuracy_low": accuracy.low,
        "eval/accuracy_high": accuracy.high,
        "eval/problems": problems,
        "eval/samples": problems * samples,
        "eval/length_mean": estimates.mean_length(judged).value,
        "eval/truncated_fraction": estimates.truncated_fraction(judged).value,
    }
    for k in estimates.powers_up_to(samples)[1:]:
        found[f"eval/pass@{k}"] = estimates.passes(judged, k).value
    return found

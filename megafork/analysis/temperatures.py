"""`megafork analyze temperatures`: accuracy when forking and other tokens are decoded at two
temperatures, one of them varied while the other stays 1 (arXiv 2506.01939, section 3)."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from megafork.analysis.temperature_curves import (
    Evaluation,
    Interval,
    Sample,
    whole,
    write_results,
)
from megafork.config import ScoreConfig
from megafork.config.file import load_config, save_config
from megafork.config.temperatures import TemperaturesConfig
from megafork.data.prompts import Prompt, read_prompts
from megafork.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from megafork.errors import UserError
from megafork.model.shape import ModelShape
from megafork.rewards.verifier import Judge
from megafork.rollout.client import RolloutClient
from megafork.rollout.sampling import Sampling, TwoTemperatures
from megafork.rollout.vllm_server import VllmServer


def pairs_of(config: TemperaturesConfig) -> list[TwoTemperatures]:
    """The baseline first, then one temperature at a time; no pair twice."""
    sweep = config.sweep
    pairs = [TwoTemperatures(sweep.threshold)]
    pairs += [TwoTemperatures(sweep.threshold, above=t) for t in sweep.above]
    pairs += [TwoTemperatures(sweep.threshold, below=t) for t in sweep.below]
    return list(dict.fromkeys(pairs))


def sweep_temperatures(config: TemperaturesConfig, output: Path, device: str) -> Path:
    """Generate, judge, and write OUTPUT/{config.toml, samples/, temperatures.csv, .json, .png}.

    Pairs of temperatures whose samples OUTPUT has already are not generated again. Returns the
    figure. Raises UserError before anything is started for what can be known to fail.
    """
    shape, tokenizer, prompts, judge = _prepare(config)
    _claim(config, output)
    server = VllmServer(
        config.model.path,
        dtype=config.rollout.dtype or config.model.dtype,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        max_num_seqs=config.rollout.max_num_seqs,
        log_path=output / "vllm.log",
        device=device,
        tensor_parallel=config.rollout.tensor_parallel,
        python=config.rollout.python or sys.executable,
        startup_timeout_s=config.rollout.startup_timeout_s,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        kv_cache_gib=config.rollout.cpu_kv_cache_gib,
        two_temperatures=True,
    )
    pairs = pairs_of(config)
    missing = [pair for pair in pairs if not _samples_path(output, pair).exists()]
    if missing:
        with server:
            client = server.client(config.rollout.request_timeout_s)
            for pair in missing:
                sampling = Sampling(
                    max_tokens=config.rollout.max_response_tokens,
                    stop_token_ids=shape.eos_token_ids,
                    forking_temperatures=pair,
                )
                size = config.rollout.group_size
                work = _generate(client, prompts, tokenizer, judge, sampling, size)
                samples = asyncio.run(work)
                with whole(_samples_path(output, pair)) as partial, partial.open("w") as file:
                    file.writelines(json.dumps(sample) + "\n" for sample in samples)
                print(_told(Evaluation.of(pair, samples)), flush=True)
    evaluations = [Evaluation.of(pair, _read(_samples_path(output, pair))) for pair in pairs]
    about = {
        "model": config.model.path,
        "data": config.data.train,
        "threshold": config.sweep.threshold,
        "problems": len(prompts),
        "samples": config.rollout.group_size,
    }
    return write_results(evaluations, about, output)


def _samples_path(output: Path, pair: TwoTemperatures) -> Path:
    return output / "samples" / f"above_{pair.above:g}_below_{pair.below:g}.jsonl"


def _read(path: Path) -> Iterator[Sample]:
    with path.open() as lines:
        yield from map(json.loads, lines)


def _prepare(config: TemperaturesConfig) -> tuple[ModelShape, Tokenizer, list[Prompt], Judge]:
    shape = ModelShape.from_folder(config.model.path)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > shape.max_positions:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
            f"max_position_embeddings={shape.max_positions}: lower one of them"
        )
    if not shape.eos_token_ids:
        raise UserError(
            f"model.path={config.model.path}: neither generation_config.json nor config.json names "
            "an eos_token_id, so no response could end: add it"
        )
    reader = ScoreConfig.model_validate(
        {"model": {"path": config.model.path}, "tokenizer": config.tokenizer}
    )
    check_tokenizer(reader, shape.vocab_size, chat_template=config.data.chat_template)
    tokenizer = load_tokenizer(reader, chat_template=config.data.chat_template)
    prompts = read_prompts(config.data.train, config.data, tokenizer.encode)
    return shape, tokenizer, prompts, Judge(config.reward)


def _claim(config: TemperaturesConfig, output: Path) -> None:
    """Raise UserError when the folder holds a sweep with other settings than its temperatures."""
    path = output / "config.toml"
    if path.exists():
        before = load_config(TemperaturesConfig, path, []).model_dump()
        now = config.model_dump()
        for settings in (before, now):
            del settings["sweep"]["above"], settings["sweep"]["below"]
        changed = [
            f"{name}.{key}={now[name][key]} (there: {before[name][key]})"
            for name in now
            for key in now[name]
            if now[name][key] != before[name][key]
        ]
        if changed:
            raise UserError(
                f"--output {output} holds a sweep with other settings: {', '.join(changed)}: give "
                "another folder, or the same settings to go on with it"
            )
    (output / "samples").mkdir(parents=True, exist_ok=True)
    save_config(config, path)


async def _generate(
    client: RolloutClient,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    judge: Judge,
    sampling: Sampling,
    num_samples: int,
) -> list[Sample]:
    async def of_prompt(prompt: Prompt) -> list[Sample]:
        samples = []
        for completion in await client.generate(prompt.ids, num_samples, sampling):
            response = tokenizer.decode(completion.token_ids)
            verdict = await judge(prompt.text, response, prompt.answer)
            samples.append(
                {
                    "problem": prompt.index,
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    "response": response,
                    "accuracy": verdict.accuracy,
                    "reward": verdict.reward,
                    "truncated": completion.truncated,
                    "prompt_ids": prompt.ids,
                    "response_ids": completion.token_ids,
                    "rollout_logprobs": completion.logprobs,
                }
            )
        return samples

    async with client:
        groups = await asyncio.gather(*map(of_prompt, prompts))
    return [sample for group in groups for sample in group]


def _told(evaluation: Evaluation) -> str:
    pair, accuracy = evaluation.temperatures, Interval.of(evaluation.accuracy, 0.0, 1.0)
    return (
        f"above {pair.above:g}, below {pair.below:g}: accuracy {accuracy.mean:.1%} "
        f"({accuracy.low:.1%} to {accuracy.high:.1%}), {statistics.fmean(evaluation.length):.1f} "
        f"tokens, {statistics.fmean(evaluation.truncated):.1%} truncated"
    )

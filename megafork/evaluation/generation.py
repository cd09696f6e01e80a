"""`megafork generate`, and what `megafork eval` and evaluation in training share with it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megafork.config import EvaluateConfig, GenerateConfig, GenerationConfig
from megafork.data.columns import NO_FURTHER, Further
from megafork.data.prompts import Data, Prompt, lines_of, read_prompts, read_rows
from megafork.data.sample import Sample
from megafork.data.tokenizer import Tokenizer, check_tokenizer, load_tokenizer
from megafork.errors import Interrupted, UserError
from megafork.evaluation.sample_file import PROMPTS, SampleFile, Settings
from megafork.evaluation.source import ModelSource, find_model
from megafork.model.shape import ModelShape
from megafork.rollout.client import RolloutClient
from megafork.rollout.ends import check_ends, stop_token_ids
from megafork.rollout.engine import Served, api_key_of, check_server, start_here
from megafork.rollout.fleet import Fleet
from megafork.rollout.placement import NodeDevices
from megafork.rollout.sampling import Sampling
from megafork.rollout.vllm_server import log_paths
from megafork.system.signals import Interruption
from megafork.verifiers.names import check_answers, columns_of

Rows = list[dict[str, Any]]
MakeRows = Callable[[Prompt, list[Sample]], Awaitable[Rows]]
T = TypeVar("T")
_HOW_FAST = {
    "rollout": (
        *("url", "servers", "api_key_env", "python", "tensor_parallel", "max_num_seqs"),
        *("gpu_memory_utilization", "cpu_kv_cache_gib", "startup_timeout_s", "request_timeout_s"),
    ),
    "reward": ("workers", "timeout_s", "memory_mib", "max_failed_fraction", "environment"),
}
"""Settings that change how fast samples come and are judged, not what they are drawn from."""


@dataclass(frozen=True)
class Input:
    """The model and the settings to generate with, all of it checked."""

    config: GenerateConfig
    """model.path is the folder with the model's config and tokenizer"""
    source: ModelSource
    shape: ModelShape

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded when all else is checked: importing transformers takes seconds."""
        data = self.config.data
        return load_tokenizer(
            self.config, chat_template=data.chat_template, enable_thinking=data.enable_thinking
        )

    def prompts(self, path: Data) -> list[Prompt]:
        """Read the prompts of a file, or of several as one, and print the first."""
        data, encode = self.config.data, self.tokenizer.encode_prompt
        prompts = read_prompts(path, data, encode, data.id_key, _columns_of(self.config), _note)
        lines = lines_of(prompts[0], self.tokenizer)
        name = path if isinstance(path, str | Path) else ", ".join(path)
        print("\n".join([f"first prompt of {name}:", *lines]), flush=True)
        return prompts

    def sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            temperature=rollout.temperature,
            max_tokens=rollout.max_response_tokens,
            stop_token_ids=stop_token_ids(self.shape, self.tokenizer),
            top_p=rollout.top_p,
            top_k=rollout.top_k or -1,
        )

    def served(self, folder: Path) -> Served:
        config = self.config
        return Served(
            str(folder),
            config.rollout.dtype or self.source.dtype(),
            config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        )

    def settings(self) -> Settings:
        """Return all that samples depend on but the prompts, flat; for SampleFile."""
        dumped = self.config.model_dump(mode="json")
        flat = {
            f"{section}.{key}": value
            for section, table in dumped.items()
            for key, value in table.items()
            if key not in _HOW_FAST.get(section, ())
        }
        return flat | {
            "model.path": str(self.source.folder.resolve()),
            "model.files": self.source.fingerprint(),
            "rollout.dtype": self.config.rollout.dtype or self.source.dtype(),
            "rollout.stop_token_ids": list(self.sampling().stop_token_ids),
        }


def _columns_of(config: GenerateConfig) -> Further:
    """Return the columns that the verifiers take, where there are any."""
    if isinstance(config, EvaluateConfig):
        return columns_of(config.reward.verifiers)
    return NO_FURTHER


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_input(config: GenerateConfig, files: Iterable[Data]) -> Input:
    """Raises UserError for what can be known to fail before a tokenizer or server is loaded."""
    source = find_model(config.model.path)
    shape = source.shape()
    model = config.model.model_copy(update={"path": str(source.side)})
    config = config.model_copy(update={"model": model})
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > shape.max_positions:
        raise UserError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens} exceeds the model's max_position_embeddings="
            f"{shape.max_positions}: lower one of them"
        )
    check_server(config.rollout)
    end = check_tokenizer(config, shape.vocab_size, chat_template=config.data.chat_template)
    check_ends(config, shape, end)
    for file in files:
        rows = read_rows(file, config.data, config.data.id_key, _columns_of(config))
        if isinstance(config, EvaluateConfig):
            check_answers(rows, config.reward)
    source.check_weights()
    return Input(config, source, shape)


def digest(prompts: Sequence[Prompt]) -> Settings:
    """The setting that tells a file's prompts, as they are asked, from others."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps([prompt.id, prompt.text, prompt.answer, prompt.ids]).encode())
    return {PROMPTS: found.hexdigest()}


def generate_file(config: GenerateConfig, data: Data, output: Path) -> None:
    """Write `output`: {id, sample, prompt, prompt_ids, response, response_ids, rollout_logprobs,
    finish_reason, answer} for every response, in the prompts' order.

    Raises UserError before anything is started or written, Interrupted after a signal.
    """
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name the file to write, as in out.jsonl")
    given = check_input(config, [data])
    prompts = given.prompts(data)

    async def make_rows(prompt: Prompt, samples: list[Sample]) -> Rows:
        return [
            row_of(prompt, number, sample, given.tokenizer)
            # float32's shortest exact form has nine digits
            | {"rollout_logprobs": [float(f"{x:.9g}") for x in sample.logprobs]}
            for number, sample in enumerate(samples)
        ]

    file = SampleFile(output, given.settings() | digest(prompts), len(prompts))
    log_path = output.with_name(output.name + ".vllm.log")
    run_jobs(given, [Job(prompts, file)], make_rows, log_path=log_path)
    for log in log_paths(log_path, config.rollout.servers):
        log.unlink(missing_ok=True)
    told = f"{len(prompts)} prompts, {config.rollout.samples} responses each: {output}"
    Console().print(told, soft_wrap=True, markup=False)


def row_of(prompt: Prompt, number: int, sample: Sample, tokenizer: Tokenizer) -> dict:
    """Return a response as it is written; `megafork score` reads it."""
    return {
        "id": prompt.id,
        "sample": number,
        "prompt": prompt.text,
        "prompt_ids": prompt.ids,
        "response": tokenizer.decode(sample.token_ids),
        "response_ids": sample.token_ids.tolist(),
        "finish_reason": sample.finish_reason,
        "answer": prompt.answer,
    }


@dataclass(frozen=True)
class Job:
    """Prompts and the file that their samples go to, a group for each prompt."""

    prompts: list[Prompt]
    file: SampleFile
    sampling: Sampling | None = None
    """Unset: the settings'"""


def run_jobs(given: Input, jobs: Sequence[Job], make_rows: MakeRows, *, log_path: Path) -> None:
    """Generate what the files miss, with one server, started if there is anything to do.

    Raises Interrupted when a signal came; what is on disk is gone on with by the next call.
    """
    with contextlib.ExitStack() as stack:
        for job in jobs:
            job.file.open()
            stack.callback(job.file.close)
        todo = [(job, job.prompts[group]) for job in jobs for group in job.file.missing()]
        if not todo:
            return
        interruption = stack.enter_context(Interruption())
        scratch = log_path.with_name(log_path.name.removesuffix("vllm.log") + "converted_model")
        folder = stack.enter_context(given.source.as_hf(scratch))
        interruption.defer()
        knows_two = any(job.sampling and job.sampling.forking_temperatures for job in jobs)
        served = replace(given.served(folder), two_temperatures=knows_two)
        try:
            clients = stack.enter_context(
                _clients(given.config.rollout, served, log_path, interruption)
            )
            interruption.run(_generate(given, clients, folder, todo, make_rows))
        except Interrupted as signal:
            kept = sum(len(job.prompts) - len(job.file.missing()) for job in jobs)
            raise Interrupted(
                f"stopped by {signal}: the samples of {kept} of {sum(len(j.prompts) for j in jobs)}"
                " prompts are kept; the same command goes on from there"
            ) from None


@contextlib.contextmanager
def _clients(
    rollout: GenerationConfig, served: Served, log: Path, interruption: Interruption
) -> Iterator[list[RolloutClient]]:
    """Clients of rollout.url's servers, or of rollout.servers that are started and ended here."""
    if rollout.url is not None:
        key, timeout_s = api_key_of(rollout), rollout.request_timeout_s
        yield [RolloutClient(url, key, timeout_s=timeout_s) for url in rollout.urls]
        return
    from megafork.parallel.backend import has_cuda

    devices = NodeDevices("cuda" if has_cuda() else "cpu")
    with start_here(served, rollout, devices, log_paths(log, rollout.servers)) as local:
        local.wait(interruption.check)
        yield local.clients(rollout.request_timeout_s)


async def _generate(
    given: Input,
    clients: Sequence[RolloutClient],
    folder: Path,
    todo: Sequence[tuple[Job, Prompt]],
    make_rows: MakeRows,
) -> None:
    """Generate the groups of `todo`; the servers have to serve the model in `folder`."""
    rollout = given.config.rollout
    async with Fleet(clients, max_num_seqs=rollout.max_num_seqs) as fleet:
        await fleet.wait_until_up(rollout.startup_timeout_s, rollout.api_key_env)
        if rollout.url is not None:
            await _check_weights(clients, folder)
        await _generate_all(given, fleet, todo, make_rows)


async def _generate_all(
    given: Input, fleet: Fleet, todo: Sequence[tuple[Job, Prompt]], make_rows: MakeRows
) -> None:
    rollout = given.config.rollout
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("prompts"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )

    async def one(item: tuple[Job, Prompt]) -> None:
        job, prompt = item
        seed = None
        if rollout.seed is not None:  # of the prompt alone; response i takes seed + i
            seed = (rollout.seed * 1_000_003 + prompt.index) * rollout.samples
        sampling = job.sampling or given.sampling()
        samples = await fleet.generate(prompt.ids, rollout.samples, sampling, seed)
        job.file.append(prompt.index, await make_rows(prompt, samples))
        progress.advance(task)

    with progress:
        task = progress.add_task("generate", total=len(todo))
        at_once = groups_at_once(rollout.max_num_seqs, rollout.samples) * len(fleet.clients)
        await for_each(todo, one, at_once)


def groups_at_once(max_num_seqs: int, samples: int) -> int:
    """Requests in flight: two times what the server runs, so that it never waits for the next."""
    return math.ceil(2 * max_num_seqs / samples)


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """Run `work` on all items, begun in order. An exception of one ends the others."""
    left = iter(items)

    async def take() -> None:
        for item in left:
            await work(item)

    takers = [asyncio.create_task(take()) for _ in range(at_once)]
    try:
        await asyncio.gather(*takers)
    finally:
        for taker in takers:
            taker.cancel()
        await asyncio.gather(*takers, return_exceptions=True)


async def _check_weights(clients: Sequence[RolloutClient], folder: Path) -> None:
    """Check that a server of somebody else's has this model, and no weights of a training run."""
    for client in clients:
        serves, version = await client.model_path(), await client.weight_version()
        if Path(serves).resolve() != folder.resolve():
            raise UserError(
                f"rollout.url={client.url} serves {serves}, not {folder}: serve that, or unset "
                "rollout.url"
            )
        if version:
            raise UserError(
                f"rollout.url={client.url} has weights that a training run pushed (version "
                f"{version}), not those of {folder}: use another server, or unset rollout.url"
            )

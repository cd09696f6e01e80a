"""`megafork eval`: benchmarks with one server, every sample kept, results with their intervals."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megafork.config import EvaluateConfig
from megafork.data.prompts import Prompt
from megafork.data.sample import Sample
from megafork.data.tables import stem_of
from megafork.data.text_files import KINDS
from megafork.errors import UserError
from megafork.evaluation import estimates
from megafork.evaluation.generation import (
    Input,
    Job,
    MakeRows,
    Rows,
    check_input,
    digest,
    row_of,
    run_jobs,
)
from megafork.evaluation.sample_file import (
    SETTINGS,
    SampleFile,
    Settings,
    check_same,
    files_with_samples,
    read_settings,
    write_json,
)
from megafork.system.parsing import parse_json
from megafork.verifiers.names import check_verifiers
from megafork.verifiers.verifier import Judge

_INTERVAL = "95%, for new problems of the kind: docs/evaluation.md; of lengths Student's t"
_ROWS_AT_ONCE = 1024
Results = dict[str, Any]


def evaluate(config: EvaluateConfig, benchmarks: Sequence[str], output: Path) -> Results:
    """Write OUTPUT/samples/NAME.jsonl of every benchmark and OUTPUT/results.json, print a table.

    Samples that are there already, by the same settings, are not generated again. Raises UserError
    before anything is started or written, Interrupted after a signal. Returns the results.
    """
    files = _files_of(benchmarks, output)
    check_verifiers(config.reward.verifiers)
    given = check_input(config, files.values())
    settings = given.settings()
    results = _results_before(output, settings)
    jobs = {}
    for name, path in files.items():
        prompts = given.prompts(path)
        target = output / "samples" / f"{name}.jsonl"
        jobs[name] = Job(prompts, SampleFile(target, settings | digest(prompts), len(prompts)))
    run_judged(given, list(jobs.values()), config, log_path=output / "vllm.log")
    results |= {"model": str(given.source.folder), "confidence": estimates.CONFIDENCE}
    results |= {"interval": _INTERVAL, "settings": settings}
    found = {
        name: {"file": files[name]}
        | measure(judged_of(job.file, config.rollout.samples))
        | {"verifier_failures": dict(Counter(filter(None, _failures_of(job.file))))}
        for name, job in jobs.items()
    }
    results["benchmarks"] = results.get("benchmarks", {}) | found
    target = output / "results.json"
    write_json(target, results)
    console = Console()
    console.print(_table(found))
    told = f"results  {target}\nsamples  {output / 'samples'}"
    console.print(told, soft_wrap=True, markup=False)
    return results


def _files_of(benchmarks: Sequence[str], output: Path) -> dict[str, str]:
    """Benchmarks by the name that their results get."""
    if not benchmarks:
        raise UserError(f"name a benchmark: {KINDS}")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: give a folder for the results")
    files: dict[str, str] = {}
    for path in benchmarks:
        name = stem_of(path)
        if name in files:
            raise UserError(
                f"the benchmarks {files[name]} and {path} would both be called {name}: rename one, "
                "or evaluate them into two folders"
            )
        files[name] = path
    return files


def _results_before(output: Path, settings: Settings) -> Results:
    """Read the folder's results of other benchmarks, whose samples may be gone.

    Raises UserError where samples or results are of other settings: results.json has one for all.
    """
    for path in sorted((output / "samples").glob(f"*{SETTINGS}")):
        if files_with_samples(path.with_name(path.name.removesuffix(SETTINGS))):
            check_same(read_settings(path), settings, f"{output}: {path.name}")
    path = output / "results.json"
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        check_same(found["settings"], settings, str(path))
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not what eval wrote ({error}): remove it") from None
    return found


def run_judged(
    given: Input, jobs: Sequence[Job], config: EvaluateConfig, *, log_path: Path
) -> None:
    """Run the jobs and judge each sample.

    Raises UserError when it failed on too many; the samples are kept, with their failures, and the
    next call judges those again.
    """
    with Judge(config.reward) as judge:
        judge.tell = functools.partial(Console().print, markup=False, highlight=False)
        for job in jobs:
            if job.file.is_complete:
                _judge_again(judge, job)
        run_jobs(given, jobs, _rows_by(judge, config, given), log_path=log_path)
        for job in jobs:
            try:
                judge.check_failures(_failures_of(job.file))
            except UserError as error:
                raise UserError(
                    f"{error}. The samples are kept in {job.file.path}: the same command judges "
                    "those again that have no verdict, and generates none anew"
                ) from None


def _judge_again(judge: Judge, job: Job) -> None:
    """Judge the rows without a verdict, where an evaluation ended because there were too many."""
    file = job.file
    if not judge.has_failed(_failures_of(file)):
        return
    columns = {prompt.id: prompt.columns for prompt in job.prompts}

    async def judged(row: dict[str, Any]) -> dict[str, Any]:
        if row["failure"] is None:
            return row
        verdict = await judge(row["prompt"], row["response"], row["answer"], columns[row["id"]])
        return row | asdict(verdict)

    async def all_of(rows: Rows) -> Rows:
        return await asyncio.gather(*map(judged, rows))

    rows = file.rows()
    parts = iter(lambda: list(itertools.islice(rows, _ROWS_AT_ONCE)), [])
    file.rewrite(row for part in parts for row in asyncio.run(all_of(part)))


def _failures_of(file: SampleFile) -> list[str | None]:
    """Return why each sample has no verdict; None where it has one."""
    return [row["failure"] for row in file.rows()]


def _rows_by(judge: Judge, config: EvaluateConfig, given: Input) -> MakeRows:
    """Rows of the samples with what the verifier says of them."""

    async def make_rows(prompt: Prompt, samples: list[Sample]) -> Rows:
        rows = [row_of(prompt, i, c, given.tokenizer) for i, c in enumerate(samples)]
        verdicts = await asyncio.gather(
            *(judge(prompt.text, row["response"], prompt.answer, prompt.columns) for row in rows)
        )
        how = config.metrics.extract
        for row, verdict, sample in zip(rows, verdicts, samples, strict=True):
            voted = estimates.vote(row["response"], how, config.reward, truncated=sample.truncated)
            row |= {"extracted": voted} | asdict(verdict) | {"length": sample.num_tokens}
        return rows

    return make_rows


def judged_of(file: SampleFile, num_samples: int) -> estimates.Judged:
    """Return the judged samples of a complete file."""
    samples = (
        (row["accuracy"], row["extracted"], row["length"], row["finish_reason"] != "stop")
        for row in file.rows()
    )
    return estimates.Judged.of(samples, num_samples)


def measure(judged: estimates.Judged) -> Results:
    """Return all metrics of one benchmark; each with value, low, high and standard_error."""
    problems, samples = judged.accuracy.shape
    powers = estimates.powers_up_to(samples)
    noise = estimates.sampling_error(judged.accuracy)
    majorities = {k: estimates.majorities(judged, k) for k in powers}
    return {
        "problems": problems,
        "samples": samples,
        f"avg@{samples}": asdict(estimates.avg_at_k(judged)) | {"sampling_error": noise},
        "pass@k": {str(k): asdict(estimates.passes(judged, k)) for k in powers},
        "maj@k": {
            str(k): asdict(found) | {"monte_carlo_error": error}
            for k, (found, error) in majorities.items()
        },
        "length_mean": asdict(estimates.mean_length(judged)),
        "length_max": int(judged.length.max()),
        "truncated_fraction": asdict(estimates.truncated_fraction(judged)),
    }


def _table(benchmarks: Results) -> Table:
    table = Table(
        box=box.SIMPLE,
        collapse_padding=True,  # fits 80 columns
        caption="in %, with 95% intervals over problems; k = samples",
    )
    table.add_column("benchmark")
    for column in ("problems", "k", "avg@k", "pass@k", "maj@k", "tokens", "cut off"):
        width = len("60.0-100.0") if "@" in column else None
        table.add_column(column, justify="right", min_width=width)
    for name, found in benchmarks.items():
        n = found["samples"]
        table.add_row(
            escape(name),
            str(found["problems"]),
            str(n),
            _percent(found[f"avg@{n}"]),
            *(_percent(found[key][str(n)]) for key in ("pass@k", "maj@k")),
            f"{found['length_mean']['value']:.0f}",
            f"{100 * found['truncated_fraction']['value']:.1f}",
        )
    return table


def _percent(found: dict[str, Any]) -> str:
    text = f"{100 * found['value']:.1f}"
    if found["low"] is None:
        return text
    return f"{text}\n{100 * found['low']:.1f}-{100 * found['high']:.1f}"

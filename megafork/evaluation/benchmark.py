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
    _check_folder(output, given)
    results = _results_before(output, given)
    jobs = {}
    for name, path in files.items():
        prompts = given.prompts(path)
        target = output / "samples" / f"{name}.jsonl"
        jobs[name] = Job(
            prompts, SampleFile(target, given.settings() | digest(prompts), len(prompts))
        )
    run_judged(given, list(jobs.values()), config, log_path=_log(output))
    results |= {"model": str(given.source.folder), "confidence": estimates.CONFIDENCE}
    results |= {"interval": _INTERVAL, "settings": given.settings()}
    found = {
        name: {"file": files[name]}
        | measure(problems_of(job.file, config.rollout.samples))
        | {"verifier_failures": _failures_of(job.file)}
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


def _log(output: Path) -> Path:
    return output / "vllm.log"


def _files_of(benchmarks: Sequence[str], output: Path) -> dict[str, str]:
    """Benchmarks by the name that their results get."""
    if not benchmarks:
        raise UserError("name a benchmark: a .jsonl or .parquet file, a folder, or hf:owner/name")
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


def _check_folder(output: Path, given: Input) -> None:
    """Other benchmarks of the folder must be of the same settings: results.json has one for all."""
    for path in sorted((output / "samples").glob(f"*{SETTINGS}")):
        if files_with_samples(path.with_name(path.name.removesuffix(SETTINGS))):
            check_same(read_settings(path), given.settings(), f"{output}: {path.name}")


def _results_before(output: Path, given: Input) -> Results:
    """Results of other benchmarks in the same folder.

    Their samples may be gone, but their settings must be the same.
    """
    path = output / "results.json"
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        check_same(found["settings"], given.settings(), str(path))
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
                _judge_again(judge, job.file)
        run_jobs(given, jobs, _rows_by(judge, config, given), log_path=log_path)
        for job in jobs:
            try:
                judge.check_failures([row["failure"] for row in job.file.rows()])
            except UserError as error:
                raise UserError(
                    f"{error}. The samples are kept in {job.file.path}: the same command judges "
                    "those again that have no verdict, and generates none anew"
                ) from None


def _judge_again(judge: Judge, file: SampleFile) -> None:
    """Judge the rows without a verdict, where an evaluation ended because there were too many."""
    if not judge.has_failed([row["failure"] for row in file.rows()]):
        return

    async def judged(row: dict[str, Any]) -> dict[str, Any]:
        if row["failure"] is None:
            return row
        verdict = await judge(row["prompt"], row["response"], row["answer"])
        return row | asdict(verdict)

    async def all_of(rows: Rows) -> Rows:
        return await asyncio.gather(*map(judged, rows))

    rows = file.rows()
    parts = iter(lambda: list(itertools.islice(rows, _ROWS_AT_ONCE)), [])
    file.rewrite(row for part in parts for row in asyncio.run(all_of(part)))


def _failures_of(file: SampleFile) -> dict[str, int]:
    """Number of samples without a verdict by cause; they count as wrong."""
    return dict(Counter(row["failure"] for row in file.rows() if row["failure"] is not None))


def _rows_by(judge: Judge, config: EvaluateConfig, given: Input) -> MakeRows:
    """Rows of the samples with what the verifier says of them."""

    async def make_rows(prompt: Prompt, samples: list[Sample]) -> Rows:
        rows = [row_of(prompt, i, c, given.tokenizer) for i, c in enumerate(samples)]
        verdicts = await asyncio.gather(
            *(judge(prompt.text, row["response"], prompt.answer) for row in rows)
        )
        for row, verdict, sample in zip(rows, verdicts, samples, strict=True):
            row["extracted"] = estimates.vote(
                row["response"],
                config.metrics.extract,
                config.reward,
                truncated=sample.truncated,
            )
            row |= {"reward": verdict.reward, "accuracy": verdict.accuracy}
            row["failure"] = verdict.failure
            row["length"] = len(sample.token_ids)
        return rows

    return make_rows


def problems_of(file: SampleFile, samples: int) -> list[list[estimates.Scored]]:
    """The judged samples, `samples` of each problem, read row by row."""
    scored = (
        estimates.Scored(
            row["accuracy"], row["extracted"], row["length"], row["finish_reason"] != "stop"
        )
        for row in file.rows()
    )
    groups = iter(lambda: list(itertools.islice(scored, samples)), [])
    return list(groups)


def measure(problems: Sequence[Sequence[estimates.Scored]]) -> Results:
    """Return all metrics of one benchmark; each with value, low, high and standard_error."""
    samples = len(problems[0])
    avg = estimates.avg_at_k(problems).as_dict()
    avg["sampling_error"] = estimates.sampling_error(
        [[sample.accuracy for sample in group] for group in problems]
    )
    majority = {}
    for k in estimates.powers_up_to(samples):
        found, error = estimates.majorities(problems, k)
        majority[str(k)] = found.as_dict() | {"monte_carlo_error": error}
    return {
        "problems": len(problems),
        "samples": samples,
        f"avg@{samples}": avg,
        "pass@k": {
            str(k): estimates.passes(problems, k).as_dict() for k in estimates.powers_up_to(samples)
        },
        "maj@k": majority,
        "length_mean": estimates.mean_length(problems).as_dict(),
        "length_max": max(sample.length for group in problems for sample in group),
        "truncated_fraction": estimates.truncated_fraction(problems).as_dict(),
    }


def _table(benchmarks: Results) -> Table:
    table = Table(
        box=box.SIMPLE,
        collapse_padding=True,  # fits 80 columns
        caption="in %, with 95% intervals over problems; k = samples",
    )
    table.add_column("benchmark")
    for column in ("problems", "k", "avg@k", "pass@k", "maj@k", "tokens", "cut off"):
        width = len("10.0-20.0") if "@" in column else None
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

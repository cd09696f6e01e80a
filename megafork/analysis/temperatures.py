"""Accuracy when forking and other tokens are decoded at two temperatures (arXiv 2506.01939, section
3). One of the two is varied while the other stays 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from megafork.analysis.output import BLUE, GREY, ORANGE, Row, figure, make_folder, write_table
from megafork.config.rollouts import TemperaturesConfig
from megafork.evaluation import estimates
from megafork.evaluation.benchmark import judged_of, run_judged
from megafork.evaluation.generation import Input, Job, check_input, digest
from megafork.evaluation.sample_file import SampleFile, Settings
from megafork.rollout.sampling import TwoTemperatures
from megafork.verifiers.names import check_verifiers


def pairs_of(config: TemperaturesConfig) -> list[TwoTemperatures]:
    """The baseline, then the pairs that vary one temperature; none twice."""
    sweep = config.sweep
    pairs = [TwoTemperatures(sweep.threshold)]
    pairs += [TwoTemperatures(sweep.threshold, above=t) for t in sweep.above]
    pairs += [TwoTemperatures(sweep.threshold, below=t) for t in sweep.below]
    return list(dict.fromkeys(pairs))


def sweep_temperatures(config: TemperaturesConfig, data: Sequence[str], output: Path) -> None:
    """Write OUTPUT/samples/, a jsonl for every pair of temperatures, and OUTPUT/temperatures.csv,
    .json and .png.

    Samples that are there already, by the same settings, are not generated again; more temperatures
    may be asked for. Raises UserError before anything is started or written, Interrupted after a
    signal.
    """
    check_verifiers(config.reward.verifiers)
    given = check_input(config, [data])
    prompts = given.prompts(data)
    jobs = {}
    for pair in pairs_of(config):
        path = output / "samples" / f"above_{pair.above:.12g}_below_{pair.below:.12g}.jsonl"
        settings = _settings(given, pair) | digest(prompts)
        sampling = replace(given.sampling(), forking_temperatures=pair)
        jobs[pair] = Job(prompts, SampleFile(path, settings, len(prompts)), sampling)
    make_folder(output)
    run_judged(given, list(jobs.values()), config, log_path=output / "vllm.log")
    samples = config.rollout.samples
    found = [(pair, judged_of(job.file, samples)) for pair, job in jobs.items()]
    about = {
        "model": str(given.source.folder),
        "data": ", ".join(data),
        "threshold": config.sweep.threshold,
        "problems": len(prompts),
        "samples": samples,
    }
    rows = table(found)
    write_table(output, "temperatures", rows, about)
    draw(rows, about, output / "temperatures.png")


def _settings(given: Input, pair: TwoTemperatures) -> Settings:
    """Settings that one pair's samples depend on; the sweep's other temperatures are none."""
    settings = given.settings()
    kept = {key: value for key, value in settings.items() if not key.startswith("sweep.")}
    return kept | {"temperatures": [pair.threshold, pair.above, pair.below]}


def table(evaluations: Sequence[tuple[TwoTemperatures, estimates.Judged]]) -> list[Row]:
    """A row for each pair of temperatures, with 95% intervals over problems.

    The first pair is the baseline, T = 1 on both sides; `change` is from it, problem by problem.
    """
    baseline = evaluations[0][1].accuracy.mean(1)
    rows = []
    for pair, judged in evaluations:
        change = (judged.accuracy.mean(1) - baseline).tolist()
        columns = {
            "accuracy": estimates.avg_at_k(judged),
            "change": _mean_difference(change),
            "length": estimates.mean_length(judged),
            "truncated": estimates.truncated_fraction(judged),
        }
        row: Row = {"above": pair.above, "below": pair.below}
        for name, found in columns.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return rows


def _mean_difference(values: Sequence[float]) -> estimates.Estimate:
    """Mean of differences with Student's interval, cut to -1..1 where they lie."""
    found = estimates.estimate(values, is_share=False)
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(-1.0, found.low), high=min(1.0, found.high))


def draw(rows: Sequence[Row], about: dict[str, Any], path: Path) -> None:
    """Draw accuracy, length and truncation over the temperature that is varied, a curve a side."""
    panels = {
        "accuracy": (f"accuracy, avg@{about['samples']} (%)", 100),
        "length": ("response length (tokens)", 1),
        "truncated": ("truncated responses (%)", 100),
    }
    curves = {
        "above": (f"of tokens above {about['threshold']:g} nats of entropy (others: 1)", ORANGE),
        "below": ("of the other tokens (those above: 1)", BLUE),
    }
    with figure(path, (1,) * len(panels), height=8.4) as every_axes:
        for axes, (name, (label, scale)) in zip(every_axes, panels.items(), strict=True):
            for side, (meaning, color) in curves.items():
                other = "below" if side == "above" else "above"
                points = sorted((row for row in rows if row[other] == 1), key=lambda row: row[side])
                values = scale * numpy.array([row[name] for row in points])
                ends = [[row[f"{name}_{end}"] for row in points] for end in ("low", "high")]
                # One problem alone has no interval: its ends are None.
                bars = numpy.nan_to_num(abs(scale * numpy.array(ends, float) - values))
                axes.errorbar(
                    [row[side] for row in points],
                    values,
                    # Where nothing was truncated, a bound of nothing would dwarf what was.
                    yerr=None if name == "truncated" else bars,
                    marker="o",
                    capsize=3,
                    color=color,
                    label=f"temperature {meaning}",
                )
            axes.axvline(1.0, color=GREY, linewidth=0.8, linestyle=":")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        every_axes[-1].set_ylim(bottom=0.0, top=max(1.0, every_axes[-1].get_ylim()[1]))
        every_axes[0].legend(frameon=False, fontsize="small")
        every_axes[0].set_title(
            f"{about['problems']} problems, {about['samples']} responses each; bars: 95% over "
            "problems",
            fontsize="small",
        )
        every_axes[-1].set_xlabel("temperature that is varied (0: greedy)")

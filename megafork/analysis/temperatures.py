"""Accuracy when forking and other tokens are decoded at two temperatures, one of them varied while
the other stays 1 (arXiv 2506.01939, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megafork.analysis.output import BLUE, GREY, ORANGE, Row, figure, make_folder, write_table
from megafork.config.rollouts import TemperaturesConfig
from megafork.evaluation import estimates
from megafork.evaluation.benchmark import problems_of, run_judged
from megafork.evaluation.generation import Input, Job, check_input, digest
from megafork.evaluation.sample_file import SampleFile, Settings
from megafork.rollout.sampling import TwoTemperatures
from megafork.verifiers.names import check_verifiers

Problems = Sequence[Sequence[estimates.Scored]]


@dataclass(frozen=True)
class Evaluation:
    """What one pair of temperatures gave, problem by problem in the file's order."""

    temperatures: TwoTemperatures
    problems: Problems

    def accuracies(self) -> list[float]:
        return [sum(s.accuracy for s in samples) / len(samples) for samples in self.problems]


def pairs_of(config: TemperaturesConfig) -> list[TwoTemperatures]:
    """The baseline first, then one temperature at a time; no pair twice."""
    sweep = config.sweep
    pairs = [TwoTemperatures(sweep.threshold)]
    pairs += [TwoTemperatures(sweep.threshold, above=t) for t in sweep.above]
    pairs += [TwoTemperatures(sweep.threshold, below=t) for t in sweep.below]
    return list(dict.fromkeys(pairs))


def sweep_temperatures(config: TemperaturesConfig, data: str, output: Path) -> None:
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
    found = [Evaluation(pair, problems_of(job.file, samples)) for pair, job in jobs.items()]
    about = {
        "model": str(given.source.folder),
        "data": data,
        "threshold": config.sweep.threshold,
        "problems": len(prompts),
        "samples": samples,
    }
    rows = table(found)
    write_table(output, "temperatures", rows, about)
    draw(rows, about, output / "temperatures.png")


def _settings(given: Input, pair: TwoTemperatures) -> Settings:
    """Of one pair's samples: the other temperatures of the sweep are none of their business."""
    settings = given.settings()
    kept = {key: value for key, value in settings.items() if not key.startswith("sweep.")}
    return kept | {"temperatures": [pair.threshold, pair.above, pair.below]}


def table(evaluations: Sequence[Evaluation]) -> list[Row]:
    """One row for each; the baseline, T = 1 on both sides, is the first. Intervals: 95%, over
    problems. `change` is from the baseline problem by problem."""
    baseline = evaluations[0].accuracies()
    rows = []
    for evaluation in evaluations:
        problems = evaluation.problems
        pairs = zip(evaluation.accuracies(), baseline, strict=True)
        columns = {
            "accuracy": estimates.avg_at_k(problems),
            "change": _of_differences([ours - theirs for ours, theirs in pairs]),
            "length": estimates.mean_length(problems),
            "truncated": estimates.truncated_fraction(problems),
        }
        row: Row = {"above": evaluation.temperatures.above, "below": evaluation.temperatures.below}
        for name, found in columns.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return rows


def _of_differences(values: Sequence[float]) -> estimates.Estimate:
    """Of differences, which lie in -1..1: Student's t, cut to what is possible."""
    found = estimates.estimate(values, is_share=False)
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(-1.0, found.low), high=min(1.0, found.high))


def draw(rows: Sequence[Row], about: dict[str, Any], path: Path) -> None:
    """Accuracy, length and truncation over the temperature that is varied, a curve a side."""
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
                margins = [
                    [scale * _distance(row[name], row[f"{name}_{end}"]) for row in points]
                    for end in ("low", "high")
                ]
                # Where nothing was truncated, a bound of nothing would dwarf what was.
                bars = None if name == "truncated" else margins
                axes.errorbar(
                    [row[side] for row in points],
                    [scale * row[name] for row in points],
                    yerr=bars,
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


def _distance(value: float, end: float | None) -> float:
    """To the end of an interval, which one problem alone does not have."""
    return 0.0 if end is None else abs(value - end)

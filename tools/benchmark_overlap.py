"""Generation beside training against strictly on-policy: seconds for a step, and what is learned.

    OMP_NUM_THREADS=1 python tools/benchmark_overlap.py [--steps 30] [--repeats 2] [key=value]

The quickstart's run with rollout.max_policy_lag = 0 and 1, in turns, each with the seed of its
repetition. Trainer and server want a core each; with fewer free ones there is nothing to gain.
Writes OUT/lag_L_R (runs of `megafork train`), overlap.png and, on the screen, a table.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

from megafork.metrics.log import read_rows

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "quickstart" / "config.toml"
LAGS = (0, 1)
WARM_UP = 2
"""Steps whose times are left out"""


def train(folder: Path, lag: int, seed: int, arguments: argparse.Namespace) -> None:
    overrides = [
        "parallel.tp=1",
        "eval.every=10",
        *arguments.overrides,
        f"training.steps={arguments.steps}",
        f"training.seed={seed}",
        f"data.seed={seed}",
        f"rollout.max_policy_lag={lag}",
        f"run.dir={folder}",
    ]
    command = [sys.executable, "-m", "megafork", "train", str(CONFIG), *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def middle(folders: list[Path], name: str) -> float:
    """Median over the steps of all repetitions."""
    rows = [row for folder in folders for row in read_rows(folder / "metrics.jsonl")]
    return statistics.median(row[name] for row in rows if row["step"] > WARM_UP)


def accuracies(folder: Path) -> dict[int, float]:
    return {row["step"]: row["eval/accuracy"] for row in read_rows(folder / "eval.jsonl")}


def seconds_of_training(folder: Path) -> dict[int, float]:
    """Step -> seconds of all steps until then, evaluations left out."""
    rows = read_rows(folder / "metrics.jsonl")
    return {0: 0.0} | dict(
        zip(
            (row["step"] for row in rows),
            accumulate(row["time/total"] for row in rows),
            strict=True,
        )
    )


def table(runs: dict[int, list[Path]]) -> str:
    columns = ("time/total", "time/generate", "overlap/generation_seconds", "lag/mean")
    lines = ["| lag | s/step | waited, s | generation, s | tokens' lag | ratio | accuracy |"]
    lines.append("|" + " --- |" * 7)
    base = middle(runs[LAGS[0]], "time/total")
    for lag, folders in runs.items():
        values = [middle(folders, name) for name in columns]
        numbers = " | ".join(f"{value:.2f}" for value in values)
        last = ", ".join(f"{list(accuracies(folder).values())[-1]:.1%}" for folder in folders)
        lines.append(f"| {lag} | {numbers} | {values[0] / base:.2f} | {last} |")
    return "\n".join(lines)


def draw(runs: dict[int, list[Path]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for index, (lag, folders) in enumerate(runs.items()):
        for number, folder in enumerate(folders):
            found, seconds = accuracies(folder), seconds_of_training(folder)
            style = {"color": f"C{index}", "ms": 4, "label": f"lag {lag}" if not number else None}
            by_step.plot(list(found), list(found.values()), "o-", **style)
            by_time.plot([seconds[step] for step in found], list(found.values()), "o-", **style)
    by_step.set_ylabel("held-out accuracy")
    by_step.set_xlabel("step")
    by_time.set_xlabel("seconds of training")
    by_step.legend(frameon=False)
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "overlap")
    arguments = parser.parse_intermixed_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: choose another --out, or remove it")
    runs: dict[int, list[Path]] = {lag: [] for lag in LAGS}
    for repeat in range(arguments.repeats):
        for lag in LAGS if repeat % 2 == 0 else reversed(LAGS):
            folder = arguments.out / f"lag_{lag}_{repeat}"
            print(f"training {folder}", flush=True)
            train(folder, lag, repeat, arguments)
            runs[lag].append(folder)
    draw(runs, arguments.out / "overlap.png")
    print(f"{table(runs)}\n{arguments.out / 'overlap.png'}")


if __name__ == "__main__":
    main()

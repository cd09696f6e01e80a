"""Forking tokens against random, other and all tokens: the same budget, several seeds, one picture.

    python examples/forking_vs_all/compare.py --steps 50 --seeds 0 1 2 [section.key=value ...]

Every arm trains the quickstart's model with the same steps, prompts, seeds and learning rate; only
the selection differs. Writes OUT/ARM/seed_N (runs of `megafork train`), comparison.png,
comparison.md and comparison.csv. Runs that are done are not repeated, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import UserError
from megafork.metrics.catalogue import Chart
from megafork.metrics.charts import Curve, deviation, draw_panels, mean_curve, read_curve

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ROOT / "examples" / "quickstart" / "config.toml"
ARMS = ("top", "random", "bottom", "all")
SET_BY_US = {
    "forking.select": "--arms",
    "forking.rho": "--rho",
    "training.steps": "--steps",
    "training.seed": "--seeds",
    "data.seed": "--seeds",
    "run.dir": "--out",
}
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=")
INTERRUPTED = 75
PR_SET_PDEATHSIG = 1
ACCURACY, ENTROPY = "eval/accuracy", "entropy/mean"


@dataclass(frozen=True)
class Run:
    arm: str
    seed: int
    dir: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def is_started(self) -> bool:
        return (self.dir / "config.toml").exists()

    @property
    def is_complete(self) -> bool:
        """`megafork train` writes the last policy at its very end, in one go."""
        return (self.dir / "checkpoints" / "final").is_dir()

    @property
    def log(self) -> Path:
        return self.dir.with_suffix(".log")

    def command(self) -> list[str]:
        start = ["--resume", str(self.dir)] if self.is_started else [str(CONFIG)]
        return [sys.executable, "-m", "megafork", "train", *start, *self.overrides]

    def check(self) -> None:
        """Raises UserError when what stands in the folder was trained with other settings."""
        wanted = load_config(TrainConfig, CONFIG, self.overrides).model_dump()
        if not self.is_started:
            return
        found = load_config(TrainConfig, self.dir / "config.toml", []).model_dump()
        for section in wanted.keys() - {"run", "parallel"}:  # another layout is fine
            for key, value in wanted[section].items():
                if found[section][key] != value:
                    raise UserError(
                        f"{self.dir} was trained with {section}.{key}={found[section][key]}, not "
                        f"{value}: choose another --out, or remove it"
                    )

    def curve(self, name: str) -> Curve:
        """Return one of the run's metrics; NaN where it was no number."""
        return read_curve(self.dir, name)


def plan(arguments: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that what is done when it is cut can be compared."""
    for override in arguments.overrides:
        if (key := override.partition("=")[0]) in SET_BY_US:
            raise UserError(f"{override}: this comparison sets {key} itself: use {SET_BY_US[key]}")
    runs = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            folder = arguments.out.absolute() / arm / f"seed_{seed}"
            overrides = (
                "parallel.tp=1",
                "eval.every=10",
                *arguments.overrides,
                f"forking.select={arm}",
                f"forking.rho={arguments.rho}",
                f"training.steps={arguments.steps}",
                f"training.seed={seed}",
                f"data.seed={seed}",
                f"run.dir={folder}",
            )
            runs.append(Run(arm, seed, folder, overrides))
    return runs


def train(runs: list[Run], jobs: int, out: Path) -> None:
    """All that are left, `jobs` at once. However this ends, they save what they have and end too.

    The runs hold a lock as well, so that the next call waits for those of a call that was killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _train(runs, jobs, lock.fileno())


def _train(runs: list[Run], jobs: int, lock: int) -> None:
    waiting = [run for run in runs if not run.is_complete]
    running: dict[Run, subprocess.Popen] = {}
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = _start(run, lock)
            time.sleep(0.5)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode:
                    raise UserError(
                        f"{run.name} ended with status {process.returncode}; see {run.log}, then "
                        "call this again"
                    )
                print(f"done: {run.name}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _start(run: Run, lock: int) -> subprocess.Popen:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'going on' if run.is_started else 'start'}: {run.name}  ({run.log})", flush=True)
    with run.log.open("ab") as log:
        return subprocess.Popen(
            run.command(),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours to pass on
            preexec_fn=_end_with_us,
            pass_fds=[lock],
        )


def label(arm: str, rho: float) -> str:
    return {
        "top": f"top {rho:.0%} (forking tokens)",
        "random": f"random {rho:.0%}",
        "bottom": f"bottom {1 - rho:.0%}",
        "all": "all tokens",
    }[arm]


def draw(runs: list[Run], rho: float, path: Path) -> None:
    """Draw held-out accuracy and mean entropy over the steps, a line and a band for each arm."""
    arms = by_arm(runs)
    panels = [
        (
            Chart("", unit, ((name, unit),), is_from_zero=name != ACCURACY),
            [mean_curve(label(arm, rho), [r.curve(name) for r in arms[arm]]) for arm in arms],
        )
        for name, unit in ((ACCURACY, "held-out accuracy"), (ENTROPY, "mean entropy (nats)"))
    ]
    seeds = len(next(iter(arms.values())))
    title = (
        f"mean of {seeds} seeds, band: standard error" if seeds > 1 else "one seed, no error known"
    )
    draw_panels(path, panels, title)


def by_arm(runs: list[Run]) -> dict[str, list[Run]]:
    return {arm: [r for r in runs if r.arm == arm] for arm in dict.fromkeys(r.arm for r in runs)}


def table(runs: list[Run], rho: float) -> str:
    """Markdown: of each arm, accuracy and entropy after the last step."""
    seeds = sorted({run.seed for run in runs})
    header = ["arm", "held-out accuracy", "std", *(f"seed {s}" for s in seeds), "entropy", "std"]
    lines = [header, ["---"] * len(header)]
    for arm, members in by_arm(runs).items():
        accuracies, entropies = (
            {run.seed: run.curve(name).values[-1] for run in members}
            for name in (ACCURACY, ENTROPY)
        )
        several = len(members) > 1
        lines.append(
            [
                label(arm, rho),
                f"{statistics.fmean(accuracies.values()):.1%}",
                f"{deviation(list(accuracies.values())):.1%}" if several else "",
                *(f"{accuracies[s]:.1%}" for s in seeds),
                f"{statistics.fmean(entropies.values()):.3f}",
                f"{deviation(list(entropies.values())):.3f}" if several else "",
            ]
        )
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_csv(runs: list[Run], path: Path) -> None:
    """One row for each run and evaluated step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "step", "heldout_accuracy", "mean_entropy_nats"])
        for run in runs:
            accuracy, entropy = run.curve(ACCURACY), run.curve(ENTROPY)
            entropies = dict(zip(entropy.steps, entropy.values, strict=True))  # none of step 0
            for step, value in zip(accuracy.steps, accuracy.values, strict=True):
                writer.writerow([run.arm, run.seed, step, value, entropies.get(step, "")])


def report(runs: list[Run], rho: float, out: Path) -> None:
    """Picture and tables of the seeds that every arm has finished."""
    arms = by_arm(runs)
    done = [{run.seed for run in members if run.is_complete} for members in arms.values()]
    seeds = set.intersection(*done)
    compared = [run for run in runs if run.seed in seeds]
    if not compared:
        print("no seed is finished in every arm: nothing to compare yet")
        return
    draw(compared, rho, out / "comparison.png")
    write_csv(compared, out / "comparison.csv")
    text = table(compared, rho)
    (out / "comparison.md").write_text(text, encoding="utf-8")
    print(f"{text}{out / 'comparison.png'}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings of every run"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rho", type=float, default=0.2)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "forking_vs_all")
    parser.add_argument("--draw-only", action="store_true", help="train nothing")
    words = sys.argv[1:] if arguments is None else arguments
    overrides = [word for word in words if _OVERRIDE.match(word)]  # or --seeds would take them
    found = parser.parse_args([word for word in words if word not in overrides])
    found.overrides += overrides
    return found


def main() -> int:
    arguments = parse()
    try:
        runs = plan(arguments)
        for run in runs:
            run.check()
        if not arguments.draw_only:
            train(runs, max(arguments.jobs, 1), arguments.out)
        report(runs, arguments.rho, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; call it again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A run's curves as one picture."""

from __future__ import annotations

from pathlib import Path

from megafork.logging.metrics import read_rows


def draw_curves(run_dir: Path) -> Path:
    """Write RUN/curves.png: accuracy, entropy and threshold over the steps. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(run_dir / "metrics.jsonl")
    evaluations = read_rows(run_dir / "eval.jsonl")

    def series(name: str, rows: list[dict] = rows) -> tuple[list[int], list[float]]:
        points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(7, 8), sharex=True)
    top.plot(*series("reward/accuracy"), label="training prompts (before dynamic sampling)")
    top.plot(*series("eval/accuracy", evaluations), "o-", label="held-out prompts")
    top.set_ylabel("accuracy")
    for name, label in (
        ("forking/mean_entropy_inside", "forking tokens"),
        ("entropy/mean", "all tokens"),
        ("forking/mean_entropy_outside", "other tokens"),
    ):
        middle.plot(*series(name), label=label)
    middle.set_ylabel("mean entropy (nats)")
    bottom.plot(*series("entropy/threshold"), label="threshold of the forking tokens")
    bottom.plot(*series("entropy/p50"), label="median entropy")
    bottom.set_ylabel("entropy (nats)")
    bottom.set_xlabel("step")
    for axes in (top, middle, bottom):
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    figure.tight_layout()
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

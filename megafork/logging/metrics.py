"""metrics.jsonl, TensorBoard and the line that a person watches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE = (
    ("acc", "reward/accuracy", "{:.3f}"),
    ("reward", "reward/mean", "{:.3f}"),
    ("H", "entropy/mean", "{:.3f}"),
    ("tau", "entropy/threshold", "{:.3f}"),
    ("kept", "forking/kept_fraction", "{:.3f}"),
    ("|g|", "grad_norm", "{:.2f}"),
    ("len", "response/length_mean", "{:.0f}"),
    ("tok/s", "throughput/tokens_per_second", "{:.0f}"),
)


class MetricsLog:
    """Appends one object per step. Values that are not finite are written as null."""

    def __init__(
        self, run_dir: Path, num_steps: int, *, tensorboard: bool, steps_done: int = 0
    ) -> None:
        """steps_done: rows of later steps are removed; a resumed run writes them again."""
        self._run_dir = run_dir
        for name in ("metrics.jsonl", "eval.jsonl", "forking_tokens.jsonl"):
            _forget_after(run_dir / name, steps_done)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=steps_done + 1 if steps_done else None
            )
        self._console = Console(stderr=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=num_steps, completed=steps_done)
        self._progress.start()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        values = (
            f"{label} {form.format(metrics[name])}"
            for label, name, form in _LINE
            if name in metrics
        )
        self._console.print(f"step {step:>4}  " + "  ".join(values), highlight=False)
        self._progress.update(self._task, completed=step)

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        """What held-out prompts gave after `step` (0: before training), into eval.jsonl."""
        with (self._run_dir / "eval.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        accuracy, low, high = (row[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
        self.note(
            f"step {step:>4}  held-out accuracy {accuracy:.3f}{interval} "
            f"({row['eval/samples']} responses)"
        )

    def forking_tokens(self, step: int, report: dict[str, Any]) -> None:
        """Which tokens fork, into forking_tokens.jsonl."""
        with (self._run_dir / "forking_tokens.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | report, ensure_ascii=False) + "\n")

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def close(self) -> None:
        self._progress.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl or eval.jsonl; none when there is no such file.

    A last line without its end, left by a crash, is no row.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _forget_after(path: Path, step: int) -> None:
    """Keep the rows up to `step`, none for 0 (step 0 is evaluated again); in one go."""
    rows = read_rows(path)
    kept = [row for row in rows if 0 < step >= row["step"]]
    if not path.exists() or (len(kept) == len(rows) and path.read_bytes().endswith(b"\n")):
        return
    shorter = path.with_suffix(".partial")
    shorter.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    shorter.replace(path)

"""metrics.jsonl, TensorBoard and the line that a person watches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megafork.errors import UserError
from megafork.system.disk import naming
from megafork.system.parsing import parse_json
from megafork.system.printable import printable

if TYPE_CHECKING:
    from megafork.metrics.tensorboard_events import TensorBoardEvents

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


APPENDED = ("forking_tokens.jsonl", "entropy_histogram.jsonl", "samples.jsonl")


class MetricsLog:
    """Appends one object per step. Values that are not finite are written as null."""

    def __init__(
        self, run_dir: Path, num_steps: int, *, tensorboard: bool, steps_done: int = 0
    ) -> None:
        """steps_done: rows of later steps are removed; a resumed run writes them again."""
        self._run_dir = run_dir
        for name in ("metrics.jsonl", "eval.jsonl", *APPENDED):
            _forget_after(run_dir / name, steps_done)
        (run_dir / "metrics.jsonl").touch()
        self._events: TensorBoardEvents | None = None
        if tensorboard:
            from megafork.metrics.tensorboard_events import TensorBoardEvents  # takes half a second

            with naming(run_dir / "tensorboard"):
                self._events = TensorBoardEvents(run_dir, {}, steps_done)
        self._console = Console(stderr=True, soft_wrap=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.fields[doing]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=num_steps, completed=steps_done, doing=""
        )
        self._progress.start()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._append("metrics.jsonl", [row])
        if self._events is not None:
            with naming(self._run_dir / "tensorboard"):
                self._events.write(step, metrics)
        values = (
            f"{label} {'-' if math.isnan(metrics[name]) else form.format(metrics[name])}"
            for label, name, form in _LINE
            if name in metrics
        )
        self._console.print(f"step {step:>4}  " + "  ".join(values), highlight=False)
        self._progress.update(self._task, completed=step, doing="")

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        """Append what held-out prompts gave after `step` (0: before training) to eval.jsonl."""
        self._append("eval.jsonl", [{"step": step} | row])
        accuracy, low, high = (row[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
        self.note(
            f"step {step:>4}  held-out accuracy {accuracy:.3f}{interval} "
            f"({row['eval/samples']} responses)"
        )

    def forking_tokens(self, step: int, report: dict[str, Any]) -> None:
        """Append which tokens fork to forking_tokens.jsonl."""
        self._append("forking_tokens.jsonl", [{"step": step} | report])

    def entropy_histogram(self, step: int, histogram: dict[str, Any]) -> None:
        """Append a step's histogram to entropy_histogram.jsonl."""
        self._append("entropy_histogram.jsonl", [{"step": step} | histogram])

    def samples(self, responses: Sequence[dict[str, Any]]) -> None:
        """A step's, into samples.jsonl, one object each."""
        self._append("samples.jsonl", responses)

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if not rows:
            return
        path = self._run_dir / name
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def progress(self, text: str) -> None:
        """Tell what a step does meanwhile: beside the bar of a terminal, else as a line."""
        if self._console.is_terminal:
            self._progress.update(self._task, doing=text)
        else:
            self.note(text)

    def note(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()
        if self._events is not None:
            with naming(self._run_dir / "tensorboard"):
                self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl or another of a run's files; none when there is no such file.

    A last line without its end, left by a crash or about to be written, is no row. Raises
    UserError that names the line when another one is damaged.
    """
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as lines:  # the end of a torn line may be half a character
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                rows.append(parse_json(line))
            except ValueError as error:
                raise UserError(f"{path}:{number} is damaged ({error}): remove the line") from None
    return rows


def _forget_after(path: Path, step: int) -> None:
    """Keep the rows up to `step`, in one go."""
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= step]
    if not path.exists() or (len(kept) == len(rows) and path.read_bytes().endswith(b"\n")):
        return
    shorter = path.with_suffix(".partial")
    with naming(shorter):
        shorter.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    shorter.replace(path)

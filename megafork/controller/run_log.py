"""The files that a run writes for people: its logs, its report, its notes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megafork.config import TrainConfig
from megafork.data.sample import Group
from megafork.data.tokenizer import Tokenizer
from megafork.metrics.log import MetricsLog, read_rows
from megafork.metrics.writers import Writers
from megafork.rollout.journal import SUFFIX, Journal
from megafork.rollout.tally import Tally, tell_regularly

SKIPPED = "skipped"
"""Folder of a run: groups of mini-batches without an update"""
_HASTE_S = 10.0
"""For the writers of a run that fails: a controller that takes long to end is killed"""


class RunLog:
    """The files of a run that are not its journals and checkpoints. Close it.

    steps_done: rows of later steps are removed; a resumed run writes them again.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, *, steps_done: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.run_dir = Path(config.run.dir)
        self.metrics = MetricsLog(
            self.run_dir,
            config.training.steps,
            tensorboard=config.run.tensorboard and "tensorboard" not in config.logging.writers,
            steps_done=steps_done,
        )
        self.writers = Writers(
            config.logging.writers,
            self.run_dir,
            config.model_dump(mode="json"),
            steps_done=steps_done,
            note=self.note,
        )
        self._told_failures: set[str] = set()
        self._forget_skipped_after(steps_done)

    def _forget_skipped_after(self, steps_done: int) -> None:
        """Remove the skipped groups of later steps, which will be done again."""
        for path in (self.run_dir / SKIPPED).glob("step_*"):
            if int(path.name[5:11]) > steps_done:
                path.unlink()

    def close(self) -> None:
        self.writers.close(_HASTE_S)  # nothing is left where the run has come to its end
        self.metrics.close()

    def note(self, text: str) -> None:
        self.metrics.note(text)

    def row(self, step: int, row: Mapping[str, float]) -> None:
        self.metrics.write(step, dict(row))
        self.writers.write(step, row)

    def has_row(self, step: int) -> bool:
        return any(row["step"] == step for row in read_rows(self.run_dir / "metrics.jsonl"))

    def has_evaluated(self, step: int) -> bool:
        return any(row["step"] == step for row in read_rows(self.run_dir / "eval.jsonl"))

    @contextlib.asynccontextmanager
    async def telling(self, what: str, tally: Callable[[], Tally]) -> AsyncIterator[None]:
        """Show regularly, as long as the context lasts, how far the tally is."""
        telling = tell_regularly(tally, lambda text: self.metrics.progress(f"{what}  {text}"))
        task = asyncio.create_task(telling)
        try:
            yield
        finally:
            task.cancel()

    def failures(self, causes: Mapping[str, str]) -> None:
        """Note the verifiers' first failure of each kind; metrics.jsonl counts them all."""
        for kind, cause in dict(causes).items():
            if kind not in self._told_failures:
                self._told_failures.add(kind)
                self.note(f"warning: no verdict ({kind}), so the response scores 0: {cause}")

    def tokens(self, step: int, finished: Mapping[str, Any]) -> None:
        """Write a step's entropies: which tokens fork, the histogram, responses with their text."""
        tokenizer = self.tokenizer
        if (report := finished["forking_tokens"]) is not None:
            for name in ("highest_entropy", "most_selected"):
                for token in report[name]:
                    token["text"] = tokenizer.name(token["id"])
            self.metrics.forking_tokens(step, report)
        if finished["histogram"] is not None:
            self.metrics.entropy_histogram(step, finished["histogram"])
        self.metrics.samples(
            [
                response
                | {
                    "prompt": tokenizer.decode(response["prompt_ids"]),
                    "text": [tokenizer.name(token) for token in response["token_ids"]],
                }
                for response in finished["responses"]
            ]
        )

    def skipped(self, step: int, parts: Sequence[Mapping[str, Any]], groups: list[Group]) -> None:
        """Write the groups of mini-batches without an update, and tell of them.

        parts: each mini-batch's number, the reason, and the prompt indices of its groups.
        """
        for part in parts:
            members = set(part["groups"])
            name = f"step_{step:06d}_minibatch_{part['number']:03d}{SUFFIX}"
            with Journal(self.run_dir / SKIPPED / name) as journal:
                for group in groups:
                    if group.prompt_index in members:
                        journal.append(group)
            self.note(
                f"warning: step {step}, mini-batch {part['number']}: no update, for "
                f"{part['reason']}; its groups are in {journal.path}"
            )

    def end(self, final: Path | None) -> None:
        """Close the writers and write the report.

        final: the folder of the last policy, of a run that is complete.
        """
        from megafork.metrics.charts import draw_run  # matplotlib and jinja2 take a second
        from megafork.metrics.page import write_report

        self.writers.close()
        if final is not None:
            self.note(f"checkpoint  {final}")
            self._draw("curves", draw_run, self.run_dir / "curves.png")
        self._draw("report", write_report, self.run_dir / "report.html")
        evaluations = read_rows(self.run_dir / "eval.jsonl")
        if final is not None and evaluations:
            first, last = (evaluations[i]["eval/accuracy"] for i in (0, -1))
            self.note(f"held-out accuracy  {first:.1%} before, {last:.1%} after")

    def _draw(self, name: str, draw: Callable[[Path, Path], Path], path: Path) -> None:
        """Write a picture of the run to `path`; a run does not fail where this does."""
        try:
            self.note(f"{name:<10}  {draw(self.run_dir, path)}")
        except Exception as error:  # a picture of what is safe on disk is worth no run
            self.note(f"warning: {path} was not written: {type(error).__name__}: {error}")

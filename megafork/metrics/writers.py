"""Writers of one's own: where the metrics of each step go beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megafork.system.plugins import load_plugin

SETTING = "logging.writers"


class Writer(Protocol):
    """A destination of metrics that `logging.writers = ["MODULE:CLASS"]` makes, in the controller.

    CLASS(run_dir, config, steps_done): the run's folder as a Path; its settings as a dict of
    sections; the step that the run goes on after, 0 for a new one. Rows of later steps that an
    earlier start has written are written again. Calls have to return at once.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, by their names in metrics.jsonl; some may be NaN."""

    def close(self) -> None:
        """Write what is left; nothing is called after it."""


def load_writers(names: Sequence[str]) -> list[Callable[..., Writer]]:
    """Return what makes the writers. Raises UserError for the first that cannot be loaded."""
    return [load_plugin(SETTING, name, {}) for name in names]


class Writers:
    """The writers of a run. One that fails is told once and left out; the run goes on."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        config: dict[str, Any],
        *,
        steps_done: int,
        note: Callable[[str], None],
    ) -> None:
        """note: tells a person. Raises UserError for a writer that cannot be loaded."""
        self._note = note
        self._writers: dict[str, Writer] = {}
        for name, make in zip(names, load_writers(names), strict=True):
            try:
                self._writers[name] = make(run_dir, config, steps_done)
            except Exception as error:
                self._leave_out(name, error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                writer.write(step, metrics)
            except Exception as error:
                self._leave_out(name, error)

    def close(self) -> None:
        for name, writer in list(self._writers.items()):
            try:
                writer.close()
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        self._writers.pop(name, None)
        self._note(
            f"warning: {SETTING}={name!r} failed ({type(error).__name__}: {error}) and gets "
            "nothing more; metrics.jsonl has every step"
        )

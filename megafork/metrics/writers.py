"""Trackers and a user's own writers, which get the metrics of each step beside metrics.jsonl."""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megafork.config.learning import WRITERS
from megafork.errors import UserError
from megafork.system.plugins import load_plugin

SETTING = "logging.writers"
_PATIENCE_S = 60.0
"""For what the writers have not taken when the run ends"""


class Writer(Protocol):
    """A destination of metrics: a built-in one, or one that "MODULE:CLASS" names.

    CLASS(run_dir, config, steps_done): the run's folder as a Path; its settings as a dict of
    sections; the step that the run goes on after, 0 for a new one. Rows of later steps that an
    earlier start has written are written again. All calls come from one thread of the controller,
    so that a slow one holds nothing up.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step, by their names in metrics.jsonl; some may be NaN."""

    def close(self) -> None:
        """Write what is left; nothing is called after it."""


def load_writers(names: Sequence[str]) -> list[Callable[..., Writer]]:
    """Return what makes the writers. Raises UserError for the first that cannot be loaded."""
    for name in names:
        if name in WRITERS and not _is_installed(name):
            raise UserError(
                f"{SETTING}={name!r} needs the package {name}, which is not installed: "
                f"pip install {name}"
            )
    return [load_plugin(SETTING, name, WRITERS) for name in names]


def _is_installed(package: str) -> bool:
    """Tell whether there is such a package. A folder ./wandb of earlier runs is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class Writers:
    """The writers of a run, in a thread of their own. Close it.

    One that fails is told once and left out; the run goes on.
    """

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
        self._makers = dict(zip(names, load_writers(names), strict=True))
        self._arguments = (run_dir, config, steps_done)
        self._rows: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=SETTING, daemon=True)
        self._is_open = bool(names)
        if self._is_open:
            self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._is_open:
            self._rows.put((step, dict(metrics)))

    def close(self, patience_s: float = _PATIENCE_S) -> None:
        """Wait until the writers have taken everything. What takes longer is told and left."""
        if not self._is_open:
            return
        self._is_open = False
        self._rows.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self._note(
                f"warning: {SETTING} was not done within {patience_s:g} s of the run's end; "
                "metrics.jsonl has every step"
            )

    def _serve(self) -> None:
        writers: dict[str, Writer] = {}
        for name, make in self._makers.items():
            with self._left_out_on_failure(name, writers):
                writers[name] = make(*self._arguments)
        while (row := self._rows.get()) is not None:
            for name, writer in list(writers.items()):
                with self._left_out_on_failure(name, writers):
                    writer.write(*row)
        for name, writer in list(writers.items()):
            with self._left_out_on_failure(name, writers):
                writer.close()

    @contextlib.contextmanager
    def _left_out_on_failure(self, name: str, writers: dict[str, Writer]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            writers.pop(name, None)
            self._note(
                f"warning: {SETTING}={name!r} failed ({type(error).__name__}: {error}) and gets "
                "nothing more; metrics.jsonl has every step"
            )

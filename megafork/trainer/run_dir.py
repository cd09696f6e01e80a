"""The folder of a run: made for a new one, opened again for one that goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megafork.config import TrainConfig
from megafork.config.load import save_config
from megafork.errors import UserError
from megafork.metrics.log import APPENDED
from megafork.system.disk import naming
from megafork.system.lock import held

_OF_A_RUN = ("rollouts/step_*", "skipped/step_*", "checkpoints/step_*", "checkpoints/final")
_WHEN_WRITTEN = ("metrics.jsonl", "eval.jsonl", *APPENDED)


@contextlib.contextmanager
def open_run_dir(config: TrainConfig, *, resume: bool) -> Iterator[None]:
    """Hold the run's folder: a new one, or that of a run that goes on. Raises UserError."""
    run_dir = Path(config.run.dir)
    with held(run_dir, "run.dir"):
        (reopen_run_dir if resume else make_run_dir)(config, run_dir)
        yield


def make_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Create the run's folder with its resolved config.

    Raises UserError when it holds another run, or cannot be written. A start that failed before
    the first group or evaluation left nothing that matters.
    """
    refuse_other_run(run_dir)
    try:
        for folder in ("rollouts", "checkpoints"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.toml")
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from None


def refuse_other_run(run_dir: Path) -> None:
    """Raise UserError when the folder holds what another run has generated, learnt or measured."""
    found = [path for pattern in _OF_A_RUN for path in sorted(run_dir.glob(pattern))]
    found += [path for name in _WHEN_WRITTEN if _has_content(path := run_dir / name)]
    if found:
        raise UserError(
            f"run.dir={run_dir} holds another run ({found[0].relative_to(run_dir)}): go on with it "
            f"(megafork train --resume {run_dir}), choose another folder or remove it"
        )


def refuse_unwritable(run_dir: Path) -> None:
    """Raise UserError when the folder cannot be made or written to, without trying it."""
    existing = next(path for path in (run_dir, *run_dir.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"run.dir={run_dir} cannot be written: {existing} is no folder that one may write to"
        )


def final_model(config: TrainConfig) -> Path | None:
    """Return the model of a run that has done all of its steps; None where any work is left.

    A run that was made longer keeps its former model until it ends again, so the model must not be
    older than the newest checkpoint, which is written before it.
    """
    checkpoints = Path(config.run.dir) / "checkpoints"
    steps = {
        int(manifest.parent.name[5:]): manifest
        for manifest in checkpoints.glob("step_*/manifest.json")
        if manifest.parent.name[5:].isdigit()
    }
    final = checkpoints / "final"
    written = final / "config.json"
    if max(steps, default=0) < config.training.steps or not written.is_file():
        return None
    is_last = written.stat().st_mtime >= steps[max(steps)].stat().st_mtime
    return final if is_last else None


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def reopen_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Keep the resumed run's resolved config; the one before it, if it differs, as .old.toml."""
    path = run_dir / "config.toml"
    try:
        before = path.read_text()
        save_config(config, path)
        if path.read_text() != before:
            old = path.with_suffix(".old.toml")
            with naming(old):
                old.write_text(before)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from None

"""The folder of a run: made for a new one, opened again for one that goes on."""

from __future__ import annotations

import contextlib
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

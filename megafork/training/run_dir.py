"""The folder of a run: made for a new one, opened again for one that goes on."""

from __future__ import annotations

from pathlib import Path

from megafork.config import TrainConfig
from megafork.config.file import save_config
from megafork.errors import UserError


def make_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Create the run's folder with its resolved config.

    Raises UserError when it holds another run's groups or metrics, or cannot be written. A start
    that failed before the first group left nothing that matters.
    """
    refuse_other_run(run_dir)
    try:
        for folder in ("rollouts", "checkpoints"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.toml")
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from None


def refuse_other_run(run_dir: Path) -> None:
    """Raise UserError when the folder holds another run's groups.

    The command asks before anything is started, and rank 0 again when it makes the folder: two
    runs may have been started at once.
    """
    if any((run_dir / "rollouts").glob("*.jsonl")):
        raise UserError(
            f"run.dir={run_dir} holds another run (rollouts): go on with it (megafork train "
            f"--resume {run_dir}), choose another folder or remove it"
        )


def reopen_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Keep the resumed run's resolved config; the one before it, if it differs, as .old.toml."""
    path = run_dir / "config.toml"
    try:
        before = path.read_text()
        save_config(config, path)
        if path.read_text() != before:
            path.with_suffix(".old.toml").write_text(before)
    except OSError as error:
        raise UserError(f"run.dir={run_dir} cannot be written: {error}") from None

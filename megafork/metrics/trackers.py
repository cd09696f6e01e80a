"""Weights & Biases, MLflow and Trackio as writers of `logging.writers`.

Each takes its settings from the environment variables of its own documentation (WANDB_MODE=offline,
MLFLOW_TRACKING_URI, TRACKIO_DIR, ...), and each is imported when the run starts.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

_PROJECT = "megafork"


class _Known(msgspec.Struct):
    """The run at a tracker: its id there, and the last step that it has."""

    id: str
    last_step: int = 0


class _Tracker(ABC):
    """A run at a tracker, which RUN/trackers/NAME.json names so that a resumed run goes on there.

    None of the trackers can take back a value. So a step that is done again after a crash is not
    written again, and each step is there once.
    """

    name: ClassVar[str]

    def __init__(self, run_dir: Path, config: dict[str, Any], steps_done: int) -> None:
        self._file = run_dir / "trackers" / f"{self.name}.json"
        title = run_dir.resolve().name
        if self._file.exists():
            self._known = msgspec.json.decode(self._file.read_bytes(), type=_Known)
            self._resume(self._known.id, title, config)
        else:
            self._known = _Known(self._begin(title, config))
            self._remember(0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > self._known.last_step:
            self._log(step, metrics)
            self._remember(step)

    def _remember(self, step: int) -> None:
        self._known.last_step = step
        self._file.parent.mkdir(exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(self._known))
        partial.replace(self._file)

    @abstractmethod
    def _begin(self, title: str, config: dict[str, Any]) -> str:
        """Begin a new run and return its id."""

    @abstractmethod
    def _resume(self, run_id: str, title: str, config: dict[str, Any]) -> None:
        """Go on with a run that was begun before."""

    @abstractmethod
    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step that the run does not have yet."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left and end the run there."""


class Wandb(_Tracker):
    """A run of Weights & Biases; its files are in RUN/wandb, for `wandb sync` where offline."""

    name = "wandb"

    def __init__(self, run_dir: Path, config: dict[str, Any], steps_done: int) -> None:
        self._run_dir = run_dir
        super().__init__(run_dir, config, steps_done)

    def _begin(self, title: str, config: dict[str, Any]) -> str:
        run_id = uuid.uuid4().hex[:8]
        self._resume(run_id, title, config)
        return run_id

    def _resume(self, run_id: str, title: str, config: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", title),
            id=run_id,
            resume="allow",
            dir=self._run_dir,
            config=config,
            settings=wandb.Settings(console="off"),
        )

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step, commit=True)

    def close(self) -> None:
        self._run.finish()


class MLflow(_Tracker):
    """A run of MLflow, in the experiment MLFLOW_EXPERIMENT_NAME (megafork)."""

    name = "mlflow"

    def _begin(self, title: str, config: dict[str, Any]) -> str:
        from mlflow.entities import Param

        client = self._connect()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else client.create_experiment(name)
        self._id = client.create_run(place, run_name=title).info.run_id
        params = [
            Param(f"{section}.{key}", str(value)[:6000])
            for section, values in config.items()
            for key, value in values.items()
        ]
        for first in range(0, len(params), 100):  # MLflow takes 100 at a time
            client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def _resume(self, run_id: str, title: str, config: dict[str, Any]) -> None:
        self._id = run_id
        self._connect().update_run(run_id, status="RUNNING")

    def _connect(self) -> Any:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        return self._client

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        # Other characters, which a plug-in's metric may have, are refused.
        named = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, step) for name, value in named.items()]
        )

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio(_Tracker):
    """A run of Trackio, whose name ends in a few digits of its own: Trackio resumes by name."""

    name = "trackio"

    def _begin(self, title: str, config: dict[str, Any]) -> str:
        run_id = f"{title}-{uuid.uuid4().hex[:8]}"
        self._resume(run_id, title, config)
        return run_id

    def _resume(self, run_id: str, title: str, config: dict[str, Any]) -> None:
        import trackio

        self._run = trackio.init(_PROJECT, name=run_id, resume="allow", config=config)

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()

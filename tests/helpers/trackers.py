"""Trackers in offline mode: their environment, and what they hold of a run, by their own packages.

python -m tests.helpers.trackers RUN                prints {tracker: {step: {metric: value}}}
python -m tests.helpers.trackers RUN DONE ROWS      writes rows, {step: metrics}, after DONE
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megafork.metrics.log import MetricsLog
from megafork.metrics.writers import Writers

INSTALLED = Path(__file__).parents[2] / ".venv" / "trackers"
NAMES = ("wandb", "mlflow", "trackio")
Held = dict[int, dict[str, float]]
_BLOCK, _HEADER = 32768, 7


def environment(folder: Path) -> dict[str, str]:
    """Variables with which the trackers keep everything below `folder`, and ask nobody."""
    paths = [str(INSTALLED), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(folder / "wandb-config"),
        "WANDB_CACHE_DIR": str(folder / "wandb-cache"),
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }


def read_back(run_dir: Path, folder: Path) -> dict[str, Held]:
    """What each tracker holds of the run, read in a process that has its package."""
    found = json.loads(_call(folder, run_dir).splitlines()[-1])
    return {name: {int(step): row for step, row in steps.items()} for name, steps in found.items()}


def write(run_dir: Path, folder: Path, steps_done: int, rows: Held) -> None:
    """Hand the rows to the trackers, and to metrics.jsonl, as one start of a run does."""
    _call(folder, run_dir, steps_done, json.dumps(rows))


def _call(folder: Path, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.trackers", *map(str, arguments)],
        env=os.environ | environment(folder),
        cwd=INSTALLED.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: logging" not in done.stdout, done.stdout
    return done.stdout


def as_logged(step: int, metrics: dict[str, float]) -> dict[str, float | None]:
    """The row of metrics.jsonl with these values."""
    row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"step": step} | row


def _of_wandb(run_dir: Path, run_id: str) -> list[tuple[int, str, float]]:
    """The history in the run's files of an offline W&B, one file a start."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")):
        for data in _log_records(path.read_bytes()):
            record = Record.FromString(data)
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            found += [
                (items["_step"], name, float(value))
                for name, value in items.items()
                if not name.startswith("_")
            ]
    return found


def _log_records(content: bytes) -> list[bytes]:
    """The records of a file in LevelDB's log format, whose blocks begin after W&B's own header."""
    records, parts, at = [], [], _HEADER
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + _HEADER : at + _HEADER + length])
        at += _HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(b"".join(parts))
            parts = []
    return records


def _of_mlflow(run_dir: Path, run_id: str) -> list[tuple[int, str, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    run = client.get_run(run_id)
    assert run.data.params["run.dir"]
    return [
        (metric.step, name, metric.value)
        for name in run.data.metrics
        for metric in client.get_metric_history(run_id, name)
    ]


def _of_trackio(run_dir: Path, run_id: str) -> list[tuple[int, str, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    return [
        (row["step"], name, float(value))
        for row in SQLiteStorage.get_logs("megafork", run_id)
        for name, value in row.items()
        if name not in ("step", "timestamp")
    ]


def _write(run_dir: Path, steps_done: int, rows: dict[str, dict[str, float]]) -> None:
    run_dir.mkdir(exist_ok=True)
    config = {"run": {"dir": str(run_dir)}, "training": {"steps": 4}}
    writers = Writers(NAMES, run_dir, config, steps_done=steps_done, note=print)
    with MetricsLog(run_dir, 4, tensorboard=False, steps_done=steps_done) as log:
        for step, row in rows.items():
            log.write(int(step), row)
            writers.write(int(step), row)
    writers.close()


def _read(run_dir: Path) -> None:
    found: dict[str, Any] = {}
    for name, read in zip(NAMES, (_of_wandb, _of_mlflow, _of_trackio), strict=True):
        known = json.loads((run_dir / "trackers" / f"{name}.json").read_text())
        steps: dict[int, dict[str, float]] = {}
        for step, metric, value in read(run_dir, known["id"]):
            assert metric not in steps.setdefault(step, {}), f"{name} has step {step} twice"
            steps[step][metric] = value
        found[name] = steps
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _write(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        _read(Path(sys.argv[1]))

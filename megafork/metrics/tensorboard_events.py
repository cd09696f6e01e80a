"""TensorBoard's event file, written by the tensorboard package alone.

torch.utils.tensorboard writes the same events, and takes torch to import.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardEvents:
    """A new event file in RUN/tensorboard, as a writer of `logging.writers`.

    steps_done: TensorBoard hides what earlier files of the folder hold of later steps, unless it is
    0; a resumed run writes them again.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], steps_done: int) -> None:
        self._file = EventFileWriter(str(run_dir / "tensorboard"))
        if steps_done:
            purge_step = steps_done + 1
            # TensorBoard purges at a START in an event that follows one of this file version.
            self._add(purge_step, file_version="brain.Event:2")
            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(value))])
            self._add(step, summary=summary)

    def _add(self, step: int, **content: object) -> None:
        self._file.add_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        self._file.close()

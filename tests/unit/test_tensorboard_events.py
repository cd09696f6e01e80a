"""TensorBoard's event files, beside those that torch's writer makes of the same numbers."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from megafork.metrics.log import MetricsLog
from tests.helpers.commands import ROOT

ROWS = {
    1: {"reward/mean": 0.25, "kl/reference": math.nan, "|g|": 1e-30, "lag/max": 3},
    2: {"reward/mean": -math.inf, "response/length_mean": 2**40 + 0.5, "lag/max": 0},
}


def events(folder: Path) -> list[Event]:
    """All of the folder's files in the order in which they were begun, without times and host."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name.split(".")[-1].zfill(9)):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            assert event.wall_time > 1e9
            event.wall_time = 0.0
            found.append(event)
    return found


def write(run_dir: Path, steps_done: int) -> None:
    run_dir.mkdir(exist_ok=True)
    with MetricsLog(run_dir, 4, tensorboard=True, steps_done=steps_done) as log:
        for step, row in ROWS.items():
            log.write(steps_done + step, row)


def write_with_torch(folder: Path, steps_done: int) -> None:
    writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)
    for step, row in ROWS.items():
        for name, value in row.items():
            writer.add_scalar(name, value, steps_done + step)
    writer.close()


def test_the_events_are_those_of_torch_s_writer(tmp_path):
    """Of a run and of one that goes on after its first step, bit by bit."""
    for steps_done in (0, 1):
        write(tmp_path / "run", steps_done)
        write_with_torch(tmp_path / "torch", steps_done)
    ours, theirs = events(tmp_path / "run" / "tensorboard"), events(tmp_path / "torch")
    assert [event.SerializeToString() for event in ours] == [
        event.SerializeToString() for event in theirs
    ]
    assert len(ours) > 2 * sum(map(len, ROWS.values()))


def test_tensorboard_hides_what_is_written_again(tmp_path):
    for steps_done in (0, 1):
        write(tmp_path / "run", steps_done)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    found = [(scalar.step, scalar.value) for scalar in read.Scalars("reward/mean")]
    assert found == [(1, 0.25), (2, 0.25), (3, -math.inf)]


def test_neither_torch_nor_tensorflow_is_needed(tmp_path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from megafork.metrics.log import MetricsLog\n"
        "with MetricsLog(Path(sys.argv[1]), 1, tensorboard=True, steps_done=1) as log:\n"
        "    log.write(2, {'reward/mean': 0.5})\n"
        "heavy = {'torch', 'tensorflow', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").iterdir())

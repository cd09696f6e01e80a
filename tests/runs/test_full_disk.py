"""The disk is full at each kind of a run's files: the run ends, names the file, and loses nothing.

The disk is a small tmpfs that lies over one file or folder of the run, and is really full.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megafork.metrics.log import read_rows
from tests.helpers.commands import left_over, megafork, tiny_run
from tests.helpers.live_runs import middle_of
from tests.helpers.replays import assert_kept, journalled, resume

SETTINGS = (
    "training.steps=2",
    "checkpoint.every=1",
    "run.samples_every=1",
    "eval.prompts=8",
    "eval.every=1",
    "sync.check_prompts=2",
)
FOLDERS = (".", "rollouts", "checkpoints", "tensorboard")
FILES = (
    "metrics.jsonl",
    "eval.jsonl",
    "samples.jsonl",
    "forking_tokens.jsonl",
    "entropy_histogram.jsonl",
)
PAGE = 4096


class Disk:
    """A tmpfs of `mib`, on which the copy of a file or folder takes the place of the original."""

    def __init__(self, folder: Path, mib: int = 64) -> None:
        self._folder = folder
        self._mounted: list[Path] = []
        folder.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder)
        self._mounted.append(folder)

    def put_under(self, path: Path) -> None:
        copy = self._folder / f"of {path.name}"
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            content = path.read_bytes()  # up to the end of a page, which has room to spare
            copy.write_bytes(content[:-1] + b" " * (-len(content) % PAGE) + b"\n")
        _run("mount", "--bind", copy, path)
        self._mounted.append(path)

    def fill(self) -> None:
        filler = self._folder / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def make_room(self) -> None:
        (self._folder / "filler").unlink()

    def close(self) -> None:
        for path in reversed(self._mounted):
            _run("umount", path)


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.fixture(scope="module", autouse=True)
def a_disk_can_be_mounted(tmp_path_factory):
    try:
        Disk(tmp_path_factory.mktemp("tried") / "disk", mib=1).close()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a tmpfs: {error}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, with a file of each kind."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = megafork(*tiny_run(run_dir, *SETTINGS), mark=run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@contextlib.contextmanager
def full(tmp_path: Path, path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    try:
        disk.put_under(path)
        disk.fill()
        yield disk
    finally:
        disk.close()


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_on_a_full_disk(finished, tmp_path, kind):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = journalled(run_dir)
    with full(tmp_path, run_dir / kind) as disk:
        done = megafork("train", "--resume", run_dir, "training.steps=4", mark=run_dir)
        assert_it_ended(done.returncode, done.stderr, run_dir, run_dir / kind)
        assert list((run_dir / "checkpoints").glob("*.partial")) == []
        assert_kept(run_dir, before)
        disk.make_room()
        assert_it_goes_on(run_dir, before)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_on_a_disk_that_is_full_all_at_once(finished, tmp_path, kind):
    """In the middle of a step: when a run starts it writes some of them anew, under other names."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = journalled(run_dir)
    resumed = ("train", "--resume", run_dir, "training.steps=4")
    with middle_of(3, run_dir, *resumed) as (run, moment), full(tmp_path, run_dir / kind):
        moment.go_on()
        assert_it_ended(run.end(), run.told, run_dir, run_dir / kind)
    assert_kept(run_dir, before)
    assert_it_goes_on(run_dir, before)


def assert_it_ended(status: int, told: str, run_dir: Path, path: Path) -> None:
    print(told)
    assert status == 2, told
    [line] = [line for line in told.splitlines() if line.startswith("error")]
    assert "No space left on device: " in line and str(path) in line
    assert line.endswith("make room and start it again") or "the checkpoint of step 3" in line
    assert "Traceback" not in told
    assert left_over(run_dir) == []


def assert_it_goes_on(run_dir: Path, before: dict[str, bytes]) -> None:
    resume(run_dir, "training.steps=4")
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert_kept(run_dir, before)
    assert (run_dir / "checkpoints" / "final" / "config.json").exists()
    assert list((run_dir / "checkpoints").glob("*.partial")) == []

"""Files that have to last: they are written to the disk itself before a name says that they are
there."""

from __future__ import annotations

import contextlib
import os
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megafork.system.disk import naming, sync

_BLOCK = 1 << 24


def checksum(path: Path) -> tuple[int, int]:
    """Return (size, CRC-32) of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return size, crc


def files_of(folder: Path) -> list[Path]:
    """Return the files below `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_and_sync(path: Path, content: bytes) -> None:
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def rename_synced(partial: Path, final: Path) -> None:
    """Give a folder whose files are on the disk its name, such that a power cut cannot take files
    away from under the name. `final` must not exist."""
    for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
        sync(folder)
    partial.rename(final)
    sync(final.parent)


@contextlib.contextmanager
def torch_save_raises_os_error() -> Iterator[None]:
    """Turn a RuntimeError of torch.save into an OSError, which all else raises on a full disk."""
    try:
        yield
    except RuntimeError as error:
        frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        if torch.save.__code__ not in frames:
            raise
        raise OSError(f"torch.save, as on a full disk: {error}") from error

"""Helpers for files that have to survive a crash or a power cut."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megafork.errors import UserError

_BLOCK = 1 << 20


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError inside name `path`; Python's own names the file only when it is opened."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def refuse_links(folder: Path, setting: str) -> None:
    """Raise UserError for a symbolic link in the folder, by which we would write elsewhere.

    setting: the folder's key; the folder itself may be a link.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.is_symlink():
            raise UserError(
                f"{setting}={folder} holds a symbolic link, {path.relative_to(folder)}, by which "
                "files elsewhere would be written: remove it (the folder itself may be a link)"
            )


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cut_torn_line(path: Path) -> None:
    """Cut off an unfinished last line, as a crash in the middle of a write leaves it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:  # backwards: it may be gigabytes
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)

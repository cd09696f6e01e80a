"""A folder's lock: one process at a time writes into it, on whichever machine it runs.

A file beside what is written names its holder. On one machine the kernel's lock on that file says
whether the holder lives, because it goes with the holder however that ends. Between machines, on
NFS for instance, a kernel's lock may not reach the others, or may outlive its machine; so the
holder touches the file every few seconds, and a file that was not touched for STALE_S is stale.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megafork.errors import UserError
from megafork.system.disk import naming

NAME = "lock"
HELD = "MEGAFORK_LOCK"
"""Tells the processes that a holder starts which lock it holds for them"""
STALE_S = 45.0
"""Seconds without a touch; a node launcher ends a machine that is cut off sooner"""
_BEAT_S = 5.0
_LOOK_S = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks"""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    boot: str
    """The machine's boot id, which changes with every start"""
    pid: int
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), _boot(), os.getpid(), since, uuid.uuid4().hex)

    @property
    def is_of_this_machine(self) -> bool:
        return self.boot == _boot()

    def told(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def refuse_held(folder: Path, setting: str) -> None:
    """Raise UserError when the folder is in use, as far as can be known without writing.

    setting: the folder's key, for the message.
    """
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    with _closing(descriptor):
        holder = _read(descriptor)
        if holder is None or os.environ.get(HELD) == holder.token:
            return
        is_free = _lock(descriptor, fcntl.LOCK_SH)
        if is_free is None or not holder.is_of_this_machine:
            is_free = time.time() - os.fstat(descriptor).st_mtime > STALE_S
    if not is_free:
        raise _in_use(path, setting, holder)


@contextlib.contextmanager
def held(folder: Path, setting: str) -> Iterator[None]:
    """Hold the folder's lock; the folder is made where there is none.

    In a process that the holder has started this does nothing. Raises UserError when another
    process holds it; that may take STALE_S to find out when it is on another machine.
    """
    path = folder / NAME
    if (token := os.environ.get(HELD)) and (there := _at(path)) and there.token == token:
        yield
        return
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(path, setting)
    except OSError as error:
        raise UserError(f"{setting}={folder} cannot be written: {error}") from None
    holder, ended = Holder.this_process(), threading.Event()
    try:
        with naming(path):
            _write(descriptor, holder)
    except OSError:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    beating = threading.Thread(
        target=_beat, args=(path, descriptor, holder, ended), name="lock", daemon=True
    )
    beating.start()
    os.environ[HELD] = holder.token
    try:
        yield
    finally:
        del os.environ[HELD]
        ended.set()
        beating.join()
        if _at(path) == holder:
            path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:  # and nothing was written into it
            with contextlib.suppress(OSError):
                folder.rmdir()


def _taken(path: Path, setting: str) -> int:
    """Return a descriptor of the file, locked where that is possible.

    Raises UserError when somebody else holds it.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            is_free, holder = _lock(descriptor, fcntl.LOCK_EX), _read(descriptor)
            if is_free is False and (holder is None or holder.is_of_this_machine):
                raise _in_use(path, setting, holder)
            if holder is not None and (is_free is None or not holder.is_of_this_machine):
                touched = os.fstat(descriptor).st_mtime
                _wait_until_stale(path, setting, holder, touched)
                if is_free is False and not _stays(descriptor, touched):
                    continue  # somebody here takes it at this moment
            if _is_at(path, descriptor):  # else its holder has just removed it
                stack.pop_all()
                return descriptor


def _wait_until_stale(path: Path, setting: str, holder: Holder, touched: float) -> None:
    """Wait until the file is stale or gone. Raises UserError when its holder touches it."""
    told = False
    while _age(path, touched) <= STALE_S:
        try:
            descriptor = os.open(path, os.O_RDONLY)  # NFS asks its server when a file is opened
        except FileNotFoundError:
            return
        with _closing(descriptor):
            if os.fstat(descriptor).st_mtime != touched:
                raise _in_use(path, setting, _read(descriptor) or holder)
        if not told:
            print(f"{path}: is {holder.told()}, still there?", file=sys.stderr, flush=True)
            told = True
        time.sleep(_LOOK_S)


def _stays(descriptor: int, touched: float) -> bool:
    """Return whether a stale file stays untouched though locked: its lock outlived a machine."""
    deadline = time.monotonic() + 2 * _BEAT_S
    while time.monotonic() < deadline:
        if os.fstat(descriptor).st_mtime != touched:
            return False
        time.sleep(_LOOK_S)
    return True


def _beat(path: Path, descriptor: int, holder: Holder, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_S):
        with contextlib.suppress(OSError):  # the next touch may come through
            there = _at(path)
            if there is not None and there != holder:
                # This process stood still for so long that another one took its place.
                print(f"error: {path} is held by {there.told()}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            os.utime(descriptor)


def _age(path: Path, touched: float) -> float:
    """Return the seconds since `touched` by the file system's clock, maybe another machine's."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}-") as now:
        return os.fstat(now.fileno()).st_mtime - touched


def _lock(descriptor: int, kind: int) -> bool | None:
    """Try to lock; False if somebody else has the lock, None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _at(path: Path) -> Holder | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with _closing(descriptor):
        return _read(descriptor)


def _read(descriptor: int) -> Holder | None:
    """Read who holds the lock; None for a file that was just made, or is none of ours."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write(descriptor: int, holder: Holder) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(holder)).encode(), 0)
    os.fsync(descriptor)


def _in_use(path: Path, setting: str, holder: Holder | None) -> UserError:
    who = "a process that has just begun" if holder is None else holder.told()
    return UserError(
        f"{setting}={path.parent} is in use by {who} ({path}): wait until it has ended, end it, or "
        "choose another folder"
    )


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

"""The process that runs verifiers (pool.py starts it): lines of JSON over a socket, in and out.

It is told with which folders to look for modules, loads the verifiers, says so, and answers one
response after the other in its main thread, so that a verifier may use signal.alarm.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from megafork.errors import UserError
from megafork.system.child_process import die_with_parent
from megafork.verifiers.names import Verifier, load_verifier, signature_of
from megafork.verifiers.signature import Signature

_LONGEST_CAUSE = 2000
_Called = tuple[Verifier, Signature]


def main(
    fd: int, parent: int, memory_mib: int, names: Sequence[str], places: Sequence[str] | None
) -> None:
    """Serve until the socket `fd` closes. parent: the trainer's process, to end with it."""
    _protect(parent, memory_mib)
    with socket.socket(fileno=fd) as connection:
        os.set_inheritable(fd, False)  # a verifier's own processes must not keep it open
        asked, told = connection.makefile("rb"), connection.makefile("wb")
        verifiers: list[_Called] = []
        _say(told, 0, _loaded(names, places, memory_mib, verifiers))
        this = os.getpid()
        for line in asked if verifiers else ():
            number, *question, columns = json.loads(line)
            message = _answer(verifiers, question, columns)
            if os.getpid() != this:  # a verifier forked, and its child came back
                os._exit(1)
            _say(told, number, message)


def _protect(parent: int, memory_mib: int) -> None:
    die_with_parent(parent)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_mib << 20
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Slurm and a terminal signal every process: the trainer alone decides what follows from it.
    # Not SIG_IGN, which a verifier's own processes would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: None)


def _loaded(
    names: Sequence[str],
    places: Sequence[str] | None,
    memory_mib: int,
    verifiers: list[_Called],
) -> dict[str, Any]:
    """Load the verifiers into `verifiers`, all or none, and return the message that says so or why
    not."""
    try:
        loaded = [(name, load_verifier(name, places)) for name in names]
        verifiers += [(function, signature_of(function, name)) for name, function in loaded]
    except BaseException as error:
        verifiers.clear()
        cause = error if isinstance(error, UserError) else _text_of(error)
        told = str(cause)[:_LONGEST_CAUSE]
        return {"unusable": f"{told} (in a worker of reward.memory_mib={memory_mib})"}
    return {"ready": True}


def _answer(
    verifiers: Sequence[_Called], question: Sequence[str], columns: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the message with the scores. question: prompt, response and answer."""
    try:
        return {"scores": [how.call(function, question, columns) for function, how in verifiers]}
    except UserError as error:
        return {"user_error": str(error)[:_LONGEST_CAUSE]}
    except MemoryError:
        return {"failure": "memory", "cause": "MemoryError"}
    except BaseException as error:  # SystemExit too
        return {"failure": "error", "cause": _text_of(error)}


def _text_of(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_LONGEST_CAUSE]
    except Exception:
        return type(error).__name__


def _say(stream: BinaryIO, number: int, message: dict[str, Any]) -> None:
    stream.write(json.dumps({"number": number} | message).encode() + b"\n")
    stream.flush()

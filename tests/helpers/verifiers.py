"""Verifiers for tests. Imports little: every worker that runs one of them imports this."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

from megafork.errors import UserError


def by_spelling(prompt: str, response: str, answer: str) -> float:
    """Right for responses of even length: most groups are mixed."""
    return float(len(response) % 2 == 0)


def some_prompts_only(prompt: str, response: str, answer: str) -> float:
    """Every third prompt (by its answer) can be solved; a reward below 1 is no accuracy."""
    return by_spelling(prompt, response, answer) if int(answer) % 3 == 0 else 0.5


def by_column(prompt: str, response: str, answer: str, level: float = 0.0) -> float:
    """The row's column."""
    return level


def never(prompt: str, response: str, answer: str) -> float:
    return 0.0


def broken(prompt: str, response: str, answer: str) -> float:
    return float(response)


def sometimes_broken(prompt: str, response: str, answer: str) -> float:
    """Raises for every fifth length."""
    if len(response) % 5 == 0:
        raise ValueError(f"[/bold] {len(response)}")  # no markup of the log's either
    return by_spelling(prompt, response, answer)


FIRST_PROMPT = "12 13 15>10:"
"""Of the quickstart's stream."""


def nan_at_the_first(prompt: str, response: str, answer: str) -> float:
    """NaN for one prompt; a signal in most other groups."""
    return math.nan if prompt == FIRST_PROMPT else by_spelling(prompt, response, answer)


def infinite(prompt: str, response: str, answer: str) -> float:
    return -math.inf


def broken_unless_mended(prompt: str, response: str, answer: str) -> float:
    if not Path(os.environ["MENDED"]).exists():
        raise ValueError("not mended")
    return by_spelling(prompt, response, answer)


def length(prompt: str, response: str, answer: str) -> float:
    return float(len(response))


def is_first_letter(prompt: str, response: str, answer: str) -> float:
    return float(response[:1] == answer[:1])


def hangs(prompt: str, response: str, answer: str) -> float:
    """With one file for each process that has begun to."""
    Path(prompt, str(os.getpid())).touch()
    while True:
        signal.pause()


def hangs_in_the_folder(prompt: str, response: str, answer: str) -> float:
    return hangs(os.environ["HUNG"], response, answer)


def waits(prompt: str, response: str, answer: str) -> float:
    """Until there is a file "go" in the folder `prompt`; leaves one that it has begun."""
    Path(prompt, f"begun-{time.monotonic_ns()}").touch()
    while not Path(prompt, "go").exists():
        time.sleep(0.01)
    return float(len(response))


def refuses(prompt: str, response: str, answer: str) -> float:
    raise UserError("an answer that is no answer")


def length_and_parent(prompt: str, response: str, answer: str) -> float:
    """The length, and by thousands the process that started this worker."""
    return 1000.0 * os.getppid() + len(response)


def acts(prompt: str, response: str, answer: str) -> float:
    """What `response` says."""
    return _ACTS[response]()


def _hang() -> float:
    while True:
        pass


def _hang_in_c() -> float:
    return float(9**9**9)


def _hang_in_a_child() -> float:
    """Prints a process that must not outlive its worker."""
    subprocess.run([sys.executable, "-c", "import signal; signal.pause()"], check=True)
    return 1.0


def _eat() -> float:
    return float(len(bytearray(8 << 30)))


def _eat_slowly() -> float:
    eaten = []
    while True:
        eaten.append(bytearray(1 << 27))


def _read_nowhere() -> float:
    return float(len(ctypes.string_at(0)))


def _leave() -> float:
    os._exit(0)


def _kill_itself() -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def _close_everything() -> float:
    os.closerange(0, 256)
    return 1.0


def _exit() -> float:
    sys.exit(3)


def _interrupt() -> float:
    raise KeyboardInterrupt


def _print_much() -> float:
    for stream in (sys.stdout, sys.stderr):
        stream.write("x" * (1 << 22))
        stream.flush()
    return 1.0


def _close_stdin() -> float:
    sys.stdin.close()
    os.close(0)
    return 1.0


def _fork() -> float:
    os.fork()  # both come back
    return 1.0


def _leave_a_child() -> float:
    if os.fork() == 0:
        signal.pause()
    return 1.0


def _limit_itself() -> float:
    """By an alarm, which can be set in the main thread alone."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()
    assert threading.current_thread() is threading.main_thread()
    return 1.0


def _has_plain_surroundings() -> float:
    assert "RANK" not in os.environ and "MASTER_PORT" not in os.environ
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["OMP_NUM_THREADS"] == "1"
    assert "torch" not in sys.modules
    return 1.0


def _survive_signals() -> float:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)
    return 1.0


def _own_socket() -> int:
    """The worker's end of its pool's socket, which this process has too."""
    for descriptor in range(3, 256):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                return descriptor
    raise AssertionError("no socket")


def _drip() -> float:
    while True:
        os.write(_own_socket(), b" ")
        time.sleep(0.05)


def _flood(content: bytes) -> float:
    descriptor = _own_socket()
    while True:
        os.write(descriptor, content)


def _say_more(content: bytes) -> float:
    os.write(_own_socket(), content)
    return 1.0


def _say_more_later() -> float:
    """Once the answer is on its way, and before the next question."""
    answered = threading.Timer(0.2, lambda: os.write(_own_socket(), SCORES + b"\n"))
    answered.start()
    return 1.0


def _has_no_secret() -> float:
    values = " ".join(os.environ.values())
    assert "s3cret" not in values, {k for k, v in os.environ.items() if "s3cret" in v}
    assert os.environ["PATH"] and os.environ["HOME"]
    return 1.0


def _sees_what_is_named() -> float:
    assert os.environ["MY_SANDBOX"] == "s3cret"
    return 1.0


SCORES = b'{"scores": [1.0], "number": 1}'

_ACTS = {
    "flood": lambda: _flood(b"x" * (1 << 16)),
    "flood of blanks": lambda: _flood(b" "),
    "flood of lines": lambda: _flood(SCORES + b"\n"),
    "drip": _drip,
    "forge": lambda: _say_more(SCORES.replace(b"1.0", b"7.5") + b"\n"),
    "forge half": lambda: _say_more(SCORES[:9]),
    "forge depth": lambda: _say_more(b"[" * 60_000 + b"\n"),
    "forge a list": lambda: _say_more(b"[1]\n"),
    "say more later": _say_more_later,
    "no secret": _has_no_secret,
    "what is named": _sees_what_is_named,
    "wrong": lambda: 0.0,
    "hang": _hang,
    "hang in C": _hang_in_c,
    "hang in a child": _hang_in_a_child,
    "eat": _eat,
    "eat slowly": _eat_slowly,
    "segfault": _read_nowhere,
    "leave": _leave,
    "kill itself": _kill_itself,
    "close everything": _close_everything,
    "exit": _exit,
    "interrupt": _interrupt,
    "print": _print_much,
    "close stdin": _close_stdin,
    "fork": _fork,
    "leave a child": _leave_a_child,
    "limit itself": _limit_itself,
    "plain surroundings": _has_plain_surroundings,
    "survive signals": _survive_signals,
    "right": lambda: 1.0,
    "text": lambda: "no number",
}

"""Real vLLM servers that the tests of a whole session share, whichever worker of xdist runs them.

    pytest (the session) <.............. watches its end .............. keeper
      gw0 -- starts it, and may end before gw1 --------------------------^  |
      gw1 -- finds it by the session's file              supervisor + vLLM <+

A start costs 15 to 20 seconds of a core. The first test that needs a server starts a keeper
(server_keeper.py), which has the server and ends with the session, even if that is killed.

A test has a server to itself: it may pause it, push to it and let it sleep. What it needs of the
server's weights it has to push or to check. Tests on one server belong to one xdist group, so that
they come one after the other on one worker and nobody waits for the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megafork.rollout.client import RolloutClient
from tests.helpers.commands import QUICKSTART, ROOT, tiny_engine

ON_QUICKSTART = pytest.mark.xdist_group("quickstart server")


def _grouped(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"{name} server")) for name in names]


ON_VLLM = _grouped("vllm-tied", "vllm-untied")
RANDOM_SERVERS = [*ON_VLLM, *_grouped("tiny-tied", "tiny-untied")]
"""Names for `random_server`: of its engine, and whether the head is the embedding"""
ONE_OF_EACH_ENGINE = _grouped("vllm-untied", "tiny-tied")
WITH_A_TIED_HEAD = _grouped("vllm-tied", "tiny-tied")


@dataclass(frozen=True)
class SharedServer:
    url: str
    api_key: str
    log_path: str
    process_group: int

    def client(self, timeout_s: float = 60.0) -> RolloutClient:
        log_path = Path(self.log_path)
        return RolloutClient(self.url, self.api_key, timeout_s=timeout_s, log_path=log_path)


def quickstart_server(
    factory: pytest.TempPathFactory,
) -> contextlib.AbstractContextManager[SharedServer]:
    """A server of the quickstart's model that knows two temperatures. Nobody pushes to it."""
    options = {"max_model_len": 96, "max_num_seqs": 64, "two_temperatures": True}
    return share(factory, "quickstart", lambda _: {"model_path": QUICKSTART / "model"} | options)


@contextlib.contextmanager
def random_server(
    factory: pytest.TempPathFactory, name: str
) -> Iterator[tuple[SharedServer, tuple[Path, Path]]]:
    """A server of a small random model, by its name, and the folders of two such models.

    It loaded the first one itself, as version 0; every push counts its version up.
    """
    from tests.helpers.reference import save_model  # only here: it needs torch

    folders = tuple(folder_of(factory) / name / which for which in ("first", "second"))

    def prepare(folder: Path) -> dict[str, Any]:
        for seed, model in enumerate(folders):
            save_model(model, tied=name.endswith("-tied"), seed=seed)
        # Defaults that would leave one token to sample: nothing of them may reach a response.
        (folders[0] / "generation_config.json").write_text(
            json.dumps({"do_sample": True, "top_k": 1, "temperature": 0.1, "eos_token_id": 1})
        )
        python = tiny_engine(folder) if name.startswith("tiny-") else sys.executable
        options = {"max_model_len": 256, "max_num_seqs": 128, "python": python}
        return {"model_path": folders[0]} | options

    with share(factory, name, prepare) as server:
        yield server, folders


@contextlib.contextmanager
def share(
    factory: pytest.TempPathFactory, name: str, prepare: Callable[[Path], dict[str, Any]]
) -> Iterator[SharedServer]:
    """The session's server of this name, for one user at a time.

    prepare: makes the first user's VllmServer options, given a folder for its files.
    """
    folder = folder_of(factory) / name
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "server.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not known.exists():
                known.write_text(_start_keeper(folder, prepare(folder)))
            server = json.loads(known.read_text())
            assert "error" not in server, server["error"]
            yield SharedServer(**server)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process may still have the file open


def folder_of(factory: pytest.TempPathFactory) -> Path:
    """The session's: each worker's own folder lies in it."""
    own = factory.getbasetemp()
    return (own.parent if _is_worker() else own) / "servers"


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def _start_keeper(folder: Path, options: dict[str, Any]) -> str:
    """What the keeper says of its server, once that is up."""
    session_pid = os.getppid() if _is_worker() else os.getpid()
    options = {"dtype": "float32", "log_path": folder / "vllm.log"} | options
    command = [sys.executable, "-m", "tests.helpers.server_keeper", str(session_pid)]
    with (folder / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [*command, json.dumps(options, default=str)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C ends pytest, and pytest's end the keeper
        )
    with keeper.stdout:
        told = keeper.stdout.readline()
    assert told, f"the keeper ended: {(folder / 'keeper.log').read_text()}"
    return told

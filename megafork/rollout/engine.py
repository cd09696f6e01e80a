"""The rollout server of a run: started by the trainer, or one that runs already."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from megafork.config import ServerConfig, TrainConfig
from megafork.errors import UserError
from megafork.rollout.client import RolloutClient
from megafork.rollout.vllm_server import VllmServer


@dataclass(frozen=True)
class Served:
    """A model, and what it is served for."""

    path: str
    dtype: str
    max_model_len: int
    """Tokens of the longest prompt with the longest response"""
    two_temperatures: bool = False
    """Whether requests may ask for `Sampling.forking_temperatures`"""
    sleeps: bool = False
    """Whether its GPUs are another's in turns"""


def served_policy(config: TrainConfig) -> Served:
    """What the server of a training run serves."""
    return Served(
        config.model.path,
        config.rollout.dtype or config.model.dtype,
        config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        sleeps=config.rollout.placement == "colocated",
    )


class RolloutServer:
    """One of our own, started in the background and ended with the context; or rollout.url's.

    A server that died is replaced by `restart`, as often as the caller likes. Its log stays beside
    the new one's.
    """

    def __init__(self, served: Served, rollout: ServerConfig, device: str, log_path: Path) -> None:
        self.served, self.rollout, self.device, self.log_path = served, rollout, device, log_path
        self._server: VllmServer | None = None
        self._started: Future[None] | None = None
        self._background = ThreadPoolExecutor(1)
        self._num_starts = 0

    def __enter__(self) -> Self:
        if self.rollout.url is None:
            self._start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        self._background.shutdown()

    def stop(self) -> None:
        """End one of our own; nothing of it is left, on a GPU either."""
        if self._server is not None:
            self._server.stop()

    def _start(self) -> None:
        if self.log_path.exists() and self._num_starts:
            self.log_path.rename(self.log_path.with_suffix(f".{self._num_starts}.log"))
        self._num_starts += 1
        self._server = build_server(self.served, self.rollout, self.device, self.log_path)
        self._started = self._background.submit(self._server.start)

    def connect(self, check: Callable[[], None] = lambda: None) -> RolloutClient:
        """Wait until the server answers. Raises UserError when it does not come up.

        check: called every second; what it raises ends the waiting.
        """
        if self._server is None or self._started is None:
            return _connect(self.rollout)
        while not self._started.done():
            check()
            wait([self._started], timeout=1.0)
        self._started.result()
        return self._server.client(timeout_s=self.rollout.request_timeout_s)

    def restart(self, check: Callable[[], None] = lambda: None) -> RolloutClient:
        """The client of a new server; of rollout.url's when it answers again.

        Raises UserError when none comes up within rollout.startup_timeout_s.
        """
        if self._server is not None:
            self._server.stop()
            self._start()
            return self.connect(check)
        deadline = time.monotonic() + self.rollout.startup_timeout_s
        while True:
            check()
            try:
                return self.connect()
            except UserError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1.0)


def build_server(
    served: Served,
    rollout: ServerConfig,
    device: str,
    log_path: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
) -> VllmServer:
    """A server of one's own, not yet started."""
    return VllmServer(
        served.path,
        dtype=served.dtype,
        max_model_len=served.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        log_path=log_path,
        device=device,
        tensor_parallel=rollout.tensor_parallel,
        python=rollout.python or sys.executable,
        startup_timeout_s=rollout.startup_timeout_s,
        host=host,
        port=port,
        api_key=api_key,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_gib=rollout.cpu_kv_cache_gib,
        two_temperatures=served.two_temperatures,
        sleeps=served.sleeps,
    )


def serve(config: TrainConfig, device: str, log_path: Path, host: str, port: int) -> None:
    """`megafork serve`: run the server until it is interrupted (SIGINT or SIGTERM)."""
    api_key = api_key_of(config.rollout)
    server = build_server(
        served_policy(config),
        config.rollout,
        device,
        log_path,
        host=host,
        port=port,
        api_key=api_key,
    )
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with server:
        print(f"serving {config.model.path} at {server.url}, log {server.log_path}", flush=True)
        while not stopped.wait(1.0):
            if not server.is_running():
                raise UserError(f"the vLLM server ended; its log is {server.log_path}")


def host_of(rollout: ServerConfig) -> str:
    """Where the server runs: rollout.url's host, or this machine."""
    host = urlsplit(rollout.url).hostname if rollout.url is not None else None
    return host or "127.0.0.1"


def api_key_of(rollout: ServerConfig) -> str:
    api_key = os.environ.get(rollout.api_key_env)
    if not api_key:
        raise UserError(
            f"the environment variable {rollout.api_key_env} (rollout.api_key_env) must hold the "
            "API key that rollout server and trainer share"
        )
    return api_key


def check_server(rollout: ServerConfig) -> None:
    """Raise UserError for a server that can be known not to start, or not to be reached."""
    if rollout.url is not None:
        api_key_of(rollout)
    if rollout.python is not None and shutil.which(rollout.python) is None:
        raise UserError(
            f"rollout.python={rollout.python} is not an executable: give a Python with vLLM"
        )


def _connect(rollout: ServerConfig) -> RolloutClient:
    assert rollout.url is not None
    client = RolloutClient(
        rollout.url.rstrip("/"), api_key_of(rollout), timeout_s=rollout.request_timeout_s
    )
    if not client.health():
        raise UserError(
            f"no rollout server answers at rollout.url={rollout.url} with the key of "
            f"{rollout.api_key_env}: start one with `megafork serve`, or unset rollout.url"
        )
    return client

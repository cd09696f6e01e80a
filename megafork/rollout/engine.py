"""The rollout server of a run: started by the trainer, or one that runs already."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from megafork.config import RolloutConfig, TrainConfig
from megafork.errors import UserError
from megafork.rollout.client import RolloutClient
from megafork.rollout.vllm_server import VllmServer


@contextmanager
def rollout_server(
    config: TrainConfig, device: str, log_path: Path
) -> Iterator[Callable[[], RolloutClient]]:
    """Gives a function that waits until the server answers and returns its client.

    Without rollout.url a server is started in the background and ends with the context. Waiting
    raises UserError when it does not come up.
    """
    if config.rollout.url is not None:
        yield lambda: _connect(config.rollout)
        return
    server = build_server(config, device, log_path)
    with ThreadPoolExecutor(1) as background:
        started = background.submit(server.start)

        def wait() -> RolloutClient:
            started.result()
            return server.client(timeout_s=config.rollout.request_timeout_s)

        try:
            yield wait
        finally:
            server.stop()


def build_server(
    config: TrainConfig,
    device: str,
    log_path: Path,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    api_key: str | None = None,
) -> VllmServer:
    """The run's server, not yet started."""
    rollout = config.rollout
    return VllmServer(
        config.model.path,
        dtype=rollout.dtype or config.model.dtype,
        max_model_len=config.data.max_prompt_tokens + rollout.max_response_tokens,
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
    )


def serve(config: TrainConfig, device: str, log_path: Path, host: str, port: int) -> None:
    """`megafork serve`: run the server until it is interrupted (SIGINT or SIGTERM)."""
    server = build_server(
        config, device, log_path, host=host, port=port, api_key=api_key_of(config.rollout)
    )
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with server:
        print(f"serving {config.model.path} at {server.url}, log {server.log_path}", flush=True)
        while not stopped.wait(1.0):
            if not server.is_running():
                raise UserError(f"the vLLM server ended; its log is {server.log_path}")


def host_of(rollout: RolloutConfig) -> str:
    """Where the server runs: rollout.url's host, or this machine."""
    host = urlsplit(rollout.url).hostname if rollout.url is not None else None
    return host or "127.0.0.1"


def api_key_of(rollout: RolloutConfig) -> str:
    api_key = os.environ.get(rollout.api_key_env)
    if not api_key:
        raise UserError(
            f"the environment variable {rollout.api_key_env} (rollout.api_key_env) must hold the "
            "API key that rollout server and trainer share"
        )
    return api_key


def _connect(rollout: RolloutConfig) -> RolloutClient:
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

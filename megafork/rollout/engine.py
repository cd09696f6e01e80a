"""The rollout server of a run: started by the trainer, or one that runs already."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megafork.config import TrainConfig
from megafork.errors import UserError
from megafork.rollout.client import RolloutClient
from megafork.rollout.vllm_server import VllmServer


@contextmanager
def rollout_server(
    config: TrainConfig, device: str, log_path: Path
) -> Iterator[Callable[[], RolloutClient]]:
    """Gives a function that waits until the server answers and returns its client.

    A server is started in the background and ends with the context. Waiting raises UserError when
    it does not come up.
    """
    rollout = config.rollout
    if rollout.url is not None:
        api_key = os.environ.get(rollout.api_key_env)
        if api_key is None:
            raise UserError(
                f"rollout.url={rollout.url} needs the server's API key in the environment variable "
                f"{rollout.api_key_env} (rollout.api_key_env)"
            )
        client = RolloutClient(rollout.url, api_key, timeout_s=rollout.request_timeout_s)
        if not client.health():
            raise UserError(
                f"no rollout server answers at rollout.url={rollout.url} with the key of "
                f"{rollout.api_key_env}: start it, or unset rollout.url to have one started"
            )
        yield lambda: client
        return
    server = VllmServer(
        config.model.path,
        dtype=rollout.dtype or config.model.dtype,
        max_model_len=config.data.max_prompt_tokens + rollout.max_response_tokens,
        max_num_seqs=rollout.max_num_seqs,
        log_path=log_path,
        device=device,
        tensor_parallel=rollout.tensor_parallel,
        python=rollout.python or sys.executable,
        startup_timeout_s=rollout.startup_timeout_s,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_gib=rollout.cpu_kv_cache_gib,
    )
    with ThreadPoolExecutor(1) as background:
        started = background.submit(server.start)

        def wait() -> RolloutClient:
            started.result()
            return server.client(timeout_s=rollout.request_timeout_s)

        try:
            yield wait
        finally:
            server.stop()

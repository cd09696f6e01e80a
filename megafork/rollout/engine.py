"""The rollout servers of a run: those that this node starts, and what all of them serve."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from megafork.config import RolloutConfig, ServerConfig, TrainConfig
from megafork.errors import UserError
from megafork.parallel.addresses import LOOPBACK, is_loopback
from megafork.parallel.ports import free_port
from megafork.rollout.client import RolloutClient
from megafork.rollout.placement import NodeDevices
from megafork.rollout.vllm_server import VllmServer, cpu_threads

_SETTLED_S = 20.0
"""A server that came up more recently may not yet be known to answer."""
_POLL_S = 0.5


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
    """Whether it sleeps while a trainer uses its GPUs"""


def served_policy(config: TrainConfig) -> Served:
    """Return what the servers of a training run serve."""
    return Served(
        config.model.path,
        config.rollout.dtype or config.model.dtype,
        config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        sleeps=config.rollout.placement == "colocated",
    )


class LocalServers:
    """The rollout servers of this node: started in the background, again when they end, and ended
    with the context.

    Their addresses and their key stay the same. A server that ends is started again at most
    max_restarts times before `forgive` says that the run went on with it. The log of one that ended
    stays beside the new one's.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], VllmServer]],
        max_restarts: int = 0,
        *,
        when_asked: bool = False,
    ) -> None:
        """makers: each makes one server, not started, always with the same port and key.
        when_asked: what has ended is started again by `start_again` alone."""
        self._kept = [_Kept(make, max_restarts, when_asked) for make in makers]

    @property
    def urls(self) -> list[str]:
        return [kept.server.url for kept in self._kept]

    def clients(self, timeout_s: float) -> list[RolloutClient]:
        return [kept.server.client(timeout_s) for kept in self._kept]

    def __enter__(self) -> Self:
        for kept in self._kept:
            kept.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all servers for good; nothing of them is left, on a GPU either."""
        with ThreadPoolExecutor(len(self._kept)) as pool:
            list(pool.map(_Kept.end, self._kept))

    def end(self, urls: Sequence[str]) -> None:
        """End those of `urls`, which then counts as an end of their own."""
        chosen = [kept.server for kept in self._kept if kept.server.url in urls]
        with ThreadPoolExecutor(len(self._kept)) as pool:
            list(pool.map(VllmServer.stop, chosen))

    def start_again(self, urls: Sequence[str], check: Callable[[], None] = lambda: None) -> None:
        """End those of `urls`; return when new ones answer or are given up. check: see `wait`."""
        self.end(urls)
        chosen = [kept for kept in self._kept if kept.server.url in urls]
        for kept in chosen:
            kept.wanted.set()
        while any(kept.is_starting for kept in chosen):
            check()
            time.sleep(_POLL_S)

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all have answered once. Raises UserError when one does not come up.

        check: called every second; what it raises ends the waiting.
        """
        for kept in self._kept:
            while not kept.first_start.wait(1.0):
                check()
            if kept.failure is not None:
                raise kept.failure

    def restart(self, urls: Sequence[str]) -> None:
        """Have those of `urls`, which do not answer, start again, but not one that just came up."""
        for kept in self._kept:
            if kept.server.url in urls:
                kept.restart()

    def forgive(self) -> None:
        """Give those that are up all their restarts again, since the run has gone on."""
        for kept in self._kept:
            kept.forgive()

    def given_up(self) -> dict[str, str]:
        """Return why servers are not started again, by their URLs."""
        return {k.server.url: str(k.failure) for k in self._kept if k.failure is not None}


class _Kept:
    """A server, with the thread that starts it again."""

    def __init__(self, make: Callable[[], VllmServer], max_restarts: int, when_asked: bool) -> None:
        self.make, self.max_restarts, self.when_asked = make, max_restarts, when_asked
        self.server = make()
        self.failure: UserError | None = None
        """Why it is not started again"""
        self.first_start = threading.Event()
        self.wanted = threading.Event()
        """It may be started; with when_asked until it is up"""
        self.wanted.set()
        self._up_since: float | None = None
        self._num_restarts = self._num_logs = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="rollout server")

    @property
    def is_starting(self) -> bool:
        """The server may be started, and is not up yet; for when_asked only."""
        return self.wanted.is_set() and self.failure is None and not self._ended.is_set()

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        with self._lock:
            self._ended.set()
            self.wanted.set()
            server = self.server
        server.stop()
        self._thread.join()

    def restart(self) -> None:
        with self._lock:
            up_since, server = self._up_since, self.server
        if up_since is not None and time.monotonic() - up_since > _SETTLED_S:
            threading.Thread(target=server.stop).start()  # what hangs takes its grace to end

    def forgive(self) -> None:
        if self._up_since is not None:
            self._num_restarts = 0

    def _keep(self) -> None:
        while True:
            failure = self._run()
            self.wanted.wait()
            with self._lock:
                if self._ended.is_set():
                    return
                if not self.first_start.is_set() or self._num_restarts >= self.max_restarts:
                    self.failure = failure
                    if self.first_start.is_set():
                        print(
                            f"warning: {failure}; it is not started again "
                            f"(rollout.max_restarts={self.max_restarts})",
                            file=sys.stderr,
                            flush=True,
                        )
                    self.first_start.set()
                    return
                self._num_restarts += 1
                self._num_logs += 1
                log = self.server.log_path
                if log.exists():
                    log.rename(log.with_suffix(f".{self._num_logs}.log"))
                self.server = self.make()

    def _run(self) -> UserError:
        """Run the server from its start to its end. Returns why it ended."""
        server = self.server
        try:
            server.start()
        except Exception as error:  # of a thread that died nobody would hear
            return error if isinstance(error, UserError) else UserError(f"{server.url}: {error!r}")
        self._up_since = time.monotonic()
        self.first_start.set()
        with self._lock:
            if self.when_asked and not self._ended.is_set():
                self.wanted.clear()
        while server.is_running() and not self._ended.wait(_POLL_S):
            pass
        self._up_since = None
        server.stop()
        return UserError(f"the rollout server at {server.url} ended; its log is {server.log_path}")


def start_here(
    served: Served,
    rollout: ServerConfig,
    devices: NodeDevices,
    logs: Sequence[Path],
    *,
    api_key: str | None = None,
    host: str = LOOPBACK,
    max_restarts: int = 0,
) -> LocalServers:
    """Make this machine's rollout.servers servers, a log for each, to be entered.

    api_key: the servers' common one; None makes a random one. Raises UserError for too few GPUs.
    """
    environments = devices.environments(rollout)
    ports: set[int] = set()
    while len(ports) < len(logs):
        ports.add(free_port(host))
    api_key = api_key or secrets.token_urlsafe(32)
    return LocalServers(
        [
            partial(
                build_server,
                served,
                rollout,
                devices.kind,
                log,
                host=host,
                port=port,
                api_key=api_key,
                environment=environment,
            )
            for log, port, environment in zip(logs, sorted(ports), environments, strict=True)
        ],
        max_restarts,
        when_asked=devices.shared,
    )


def build_server(
    served: Served,
    rollout: ServerConfig,
    device: str,
    log_path: Path,
    **own: Any,
) -> VllmServer:
    """Return a server of one's own, not yet started.

    own: what the settings do not say of it: VllmServer's host, port, api_key and environment.
    """
    return VllmServer(
        Path(served.path),
        dtype=served.dtype,
        max_model_len=served.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        log_path=log_path,
        device=device,
        tensor_parallel=rollout.tensor_parallel,
        python=rollout.python or sys.executable,
        startup_timeout_s=rollout.startup_timeout_s,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_gib=rollout.cpu_kv_cache_gib,
        cpu_threads=cpu_threads(rollout.cpu_threads, rollout.servers),
        two_temperatures=served.two_temperatures,
        sleeps=served.sleeps,
        **own,
    )


def serve(config: TrainConfig, device: str, log_path: Path, host: str, port: int) -> None:
    """`megafork serve`: run the server until it is interrupted (SIGINT or SIGTERM)."""
    from megafork.model.hf_model import check_folder

    check_folder(config.model.path)
    server = build_server(
        served_policy(config),
        config.rollout,
        device,
        log_path,
        host=host,
        port=port,
        api_key=api_key_of(config.rollout),
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
    """Return the host of a server, of one on another machine if there is one.

    It is for whoever has to be reached by all servers, at its address towards that host.
    """
    hosts = [urlsplit(url).hostname or LOOPBACK for url in rollout.urls] or [LOOPBACK]
    elsewhere = [host for host in hosts if not is_loopback(socket.gethostbyname(host))]
    return (elsewhere or hosts)[0]


def api_key_of(rollout: ServerConfig) -> str:
    api_key = os.environ.get(rollout.api_key_env)
    if not api_key:
        raise UserError(
            f"the environment variable {rollout.api_key_env} (rollout.api_key_env) must hold the "
            "API key that rollout server and trainer share: "
            f"export {rollout.api_key_env}=$(openssl rand -hex 32)"
        )
    return api_key


def check_server(rollout: ServerConfig) -> None:
    """Raise UserError for servers that can be known not to start, or not to be reached."""
    if rollout.url is not None:
        _check_urls(rollout)
        api_key_of(rollout)
    if isinstance(rollout, RolloutConfig):
        _check_count(rollout)
    if rollout.python is not None and shutil.which(rollout.python) is None:
        raise UserError(
            f"rollout.python={rollout.python} is not an executable: give a Python with vLLM"
        )


def _check_urls(rollout: ServerConfig) -> None:
    urls = rollout.urls
    for url in urls:
        if not _is_base_url(url):
            raise UserError(
                f"rollout.url={url} is not the address of a server: give http://HOST:PORT"
            )
        if urls.count(url) > 1:
            raise UserError(f"rollout.url names {url} {urls.count(url)} times: name it once")
    if rollout.servers != 1:
        raise UserError(
            f"rollout.servers={rollout.servers} are to be started, but rollout.url="
            f"{', '.join(urls)} run already: leave one of the two unset"
        )


def _check_count(rollout: RolloutConfig) -> None:
    name, count = "rollout.servers", rollout.servers
    if rollout.urls:
        name, count = "the number of servers in rollout.url", len(rollout.urls)
    if count > rollout.prompts_per_step:
        raise UserError(
            f"{name}={count} is more than rollout.prompts_per_step={rollout.prompts_per_step}: "
            "some would never be asked; lower it"
        )


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    bare = f"{parts.scheme}://{parts.hostname or ''}" + (f":{port}" if port else "")
    return parts.scheme in ("http", "https") and bool(parts.hostname) and url.lower() == bare

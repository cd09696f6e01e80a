"""Small HTTP servers with the routes of a rollout server, which a test can hold, break and kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import web

from megafork.data.sample import Sample
from megafork.rollout.client import RolloutClient
from megafork.rollout.sampling import (
    ABORT_PATH,
    CONNECT_PATH,
    GENERATE_PATH,
    UPDATE_PATH,
    encode_samples,
)

KEY = "key"


class SmallServer:
    """Answers prompt [a, b, ...] with n responses [a, seed + i]. Weights are their version alone.

    Asleep it takes no weights before their memory is awake, as little as a GPU would.
    held: requests wait until `release`. asked: prompts in the order in which they came. num_looks:
    at its health.
    """

    def __init__(self, port: int = 0, key: str = KEY) -> None:
        self.version, self.paused, self.port, self.key = 0, False, port, key
        self.asked: list[int] = []
        self.num_looks = 0
        self.waiting: dict[str, tuple[int, asyncio.Future[str]]] = {}
        self.calls: list[str] = []
        self.bodies: dict[str, dict] = {}
        self.held = self.silent = False
        self.asleep: set[str] = set()
        self.fail_next: str | None = None
        self._runner: web.AppRunner | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, timeout_s: float = 30.0) -> RolloutClient:
        return RolloutClient(self.url, KEY, timeout_s=timeout_s)

    @property
    def num_connections(self) -> int:
        return sum(one.transport is not None for one in self._runner.server.connections)

    def start(self) -> None:
        started = threading.Event()
        self._started = started
        self._thread.start()
        assert started.wait(10)

    def kill(self) -> None:
        """Connections break, and nobody listens any more."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def release(self, prompt: int, reason: str = "stop") -> None:
        for name, (first, _) in list(self.waiting.items()):
            if first == prompt:
                self._loop.call_soon_threadsafe(self._end, name, reason)

    def _end(self, name: str, reason: str) -> None:
        _, future = self.waiting.pop(name)
        if not future.done():
            future.set_result(reason)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = runner = web.AppRunner(app)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", self.port, shutdown_timeout=0.1)
        self._loop.run_until_complete(site.start())
        self.port = site._server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        for transport in [t for t in runner.server.connections if t.transport is not None]:
            transport.transport.abort()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path
        if self.silent:
            await asyncio.Event().wait()
        if path == "/health":
            self.num_looks += 1
            return web.Response()
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "Unauthorized"}}, status=401)
        self.calls.append(path)
        body = await request.json() if request.can_read_body else {}
        self.bodies[path] = body
        if self.fail_next == path:
            self.fail_next = None
            return web.json_response({"error": {"message": "told to fail"}}, status=500)
        if path == GENERATE_PATH:
            return await self._generate(body)
        if path == "/wake_up":
            self.asleep.discard(request.query["tags"])
            self.paused = bool(self.asleep)
        return web.json_response(self._administer(path, body))

    def _administer(self, path: str, body: dict) -> dict:
        if path == ABORT_PATH:
            for name in body["request_ids"]:
                if name in self.waiting:
                    self._end(name, "abort")
        elif path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path == "/sleep":
            self.asleep, self.paused = {"weights", "kv_cache"}, True
        elif path == UPDATE_PATH:
            assert self.paused and "weights" not in self.asleep
        elif path == "/update_weight_version":
            self.version = int(body["new_version"])
        elif path not in (CONNECT_PATH, "/reset_prefix_cache"):
            assert path in ("/weight_info", "/is_paused", "/wake_up"), path
        status = "asleep" if self.asleep else "awake"
        info = {"weight_version": self.version, "is_paused": self.paused, "status": status}
        return info | {"success": True}

    async def _generate(self, body: dict) -> web.Response:
        prompt, params = body["prompt_ids"], body["sampling_params"]
        self.asked.append(prompt[0])
        reason = "stop"
        if self.held:
            future = asyncio.get_running_loop().create_future()
            self.waiting[body["request_id"]] = prompt[0], future
            reason = await future
        completions = [
            Sample.from_server(
                [prompt[0], (params["seed"] or 0) + i], [-0.5, -0.5], reason, [(self.version, 0)]
            )
            for i in range(params["n"])
        ]
        return web.Response(body=encode_samples(completions))


@contextlib.contextmanager
def running(count: int) -> Iterator[list[SmallServer]]:
    servers = [SmallServer() for _ in range(count)]
    for server in servers:
        server.start()
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stand_in_for_python(folder: Path) -> Path:
    """In the place of a Python that has vLLM: whatever it is told to start, it is a SmallServer."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    python.chmod(0o755)
    return python


if __name__ == "__main__":
    options = dict(zip(sys.argv[4::2], sys.argv[5::2], strict=False))
    print("started with", *sys.argv[1:], flush=True)
    SmallServer(int(options["--port"]), os.environ["VLLM_API_KEY"]).start()
    signal.pause()

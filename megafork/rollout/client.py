"""HTTP client of one vLLM server: generation and administration."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import uuid
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp

from megafork.data.sample import Sample
from megafork.errors import UserError
from megafork.rollout.sampling import (
    ABORT_PATH,
    CONNECT_PATH,
    GENERATE_PATH,
    UPDATE_PATH,
    Sampling,
    decode_samples,
    version_number,
)

T = TypeVar("T")
_ATTEMPTS = 5  # the first one included; waits of 0.5, 1, 2 and 4 s in between
_LOG_LINES = 8
_SHOWN = 200
"""Characters of an answer that is not understood"""
_ANSWER_S = 30.0
"""What the server answers from memory, it answers within this."""
_CONNECT_S = 10.0
_HEALTH_S = 20.0
"""A busy engine takes up to 8 s to say that it lives (vllm_plugin/pulse.py)."""
_MARGIN_S = 30.0
"""By which a transfer's request outlasts the transfer's own time-out, which names a better cause"""


class ServerError(UserError):
    """The server answered with an error: its message and the HTTP status."""

    def __init__(self, path: str, status: int, message: str) -> None:
        super().__init__(f"{path} failed with HTTP {status}: {message}")
        self.path, self.status, self.message = path, status, message


class ServerLost(UserError):
    """The server does not answer, or it is not the one that has our weights."""


class ServerSlow(ServerLost):
    """A request took longer than the client allows."""


class RolloutClient:
    """Talks to one server, with a connection of its own for each request.

    timeout_s: of one attempt; a group of long responses has to be done within it.
    log_path: the server's log, quoted when the server cannot be reached.

    `generate` is idempotent and retried on connection errors; requests that change the server are
    not. Errors: ServerLost when the server cannot be reached or was started again, ServerSlow when
    it takes longer than timeout_s, ServerError when it says no.
    """

    def __init__(
        self, url: str, api_key: str, *, timeout_s: float = 3600.0, log_path: Path | None = None
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.log_path = log_path
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._version: int | None = None
        self._transfer_timeout_s = timeout_s

    @property
    def version(self) -> int:
        """The version of the weights that this client gave to the server; 0 before the first."""
        return self._version or 0

    # ------------------------------------------------------------------ generation

    async def generate(
        self,
        prompt_ids: list[int],
        n: int,
        sampling: Sampling,
        seed: int | None = None,
        *,
        request_id: str | None = None,
    ) -> list[Sample]:
        """Sample `n` responses to one prompt, in an order that means nothing.

        seed: response i is drawn with seed + i and is then reproducible (and slower).
        request_id: the name by which `abort` knows the request; the caller then looks at `aborted`.
        Without it, responses that the server aborted raise UserError: it was told to end. A
        response that ended has its stop token last, with its log-probability.
        """
        name = request_id or uuid.uuid4().hex
        given = self.version
        body = sampling.request_body(prompt_ids, n, seed, request_id=name)
        try:
            samples = await self._retried(partial(self._ask, body))
        except TimeoutError:
            raise ServerSlow(
                f"a group of {n} responses took longer than rollout.request_timeout_s="
                f"{self.timeout_s:g}: raise it or lower rollout.max_response_tokens"
            ) from None
        self._refuse_older_weights(samples, given)
        if request_id is None and any(sample.aborted for sample in samples):
            raise UserError(f"the rollout server at {self.url} aborted a request")
        return samples

    async def _ask(self, body: dict[str, Any]) -> list[Sample]:
        return decode_samples(await self._post(GENERATE_PATH, body))

    async def abort(self, request_ids: list[str]) -> None:
        """End requests of `generate`: they return what they have, finish_reason "abort"."""
        await self._retried(lambda: self._post(ABORT_PATH, {"request_ids": request_ids}))

    async def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return await self._sent("POST", path, body, self.timeout_s)

    async def _retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        for number in range(_ATTEMPTS):
            try:
                return await attempt()
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
                cause = error
            if number + 1 < _ATTEMPTS:
                await asyncio.sleep(0.5 * 2**number * random.uniform(0.8, 1.2))
                await self._refuse_another_server()
        raise await self._unreachable(cause, f"{_ATTEMPTS} attempts") from cause

    # -------------------------------------------------------------- administration

    async def is_alive(self) -> bool:
        """Return whether the server answers, and knows of no failure of its engine."""
        try:
            await self._sent("GET", "/health", None, _HEALTH_S)
            return True
        except (ServerError, aiohttp.ClientError, TimeoutError):
            return False

    async def health(self) -> bool:
        """Return whether the server answers to the key, and its engine lives with our weights."""
        return await self.why_unhealthy() is None

    async def why_unhealthy(self) -> str | None:
        """Return why the server is unhealthy, or None."""
        try:
            await self._request("GET", "/health", timeout_s=_HEALTH_S)
            version = await self.weight_version()
        except UserError as error:
            return str(error)
        return None if self._version in (None, version) else str(self._started_again(version))

    def forget_version(self) -> None:
        """Have `health` accept whatever weights the server has from now on."""
        self._version = None

    def _refuse_older_weights(self, samples: list[Sample], given: int) -> None:
        """Raise ServerLost for samples of older weights than `given`, the server's when asked."""
        for sample in samples:
            if sample.versions and sample.versions[0][0] < given:
                raise self._started_again(sample.versions[0][0])

    async def _refuse_another_server(self) -> None:
        """Raise ServerLost for a server that was started again since it was asked."""
        before = self._version
        if before is None:
            return
        try:
            version = await self.weight_version()
        except UserError:  # does not answer: the next attempt will tell
            return
        if version not in (before, self._version, before + 1):  # a push may be under way
            raise self._started_again(version)

    def _started_again(self, version: int) -> ServerLost:
        return ServerLost(
            f"the rollout server at {self.url} was started again: it has weights {version}, "
            f"not {self._version}"
        )

    async def pause(self, mode: str = "wait") -> None:
        """Stop scheduling and drop the prefix cache; the weights may then change.

        mode: "wait" finishes what is in flight, "abort" returns it as it is (finish_reason
        "abort"), "keep" freezes it (call `reset_prefix_cache(running=True)` after the update).
        """
        clear = str(mode != "keep").lower()  # what is frozen holds its part of the cache
        await self._request("POST", f"/pause?mode={mode}&clear_cache={clear}")

    async def resume(self) -> None:
        await self._request("POST", "/resume")

    async def sleep(self) -> None:
        """Give up weights and cache; what is in flight is aborted, what comes waits.

        A server on the CPU, or started without sleep mode, keeps its memory and waits all the same.
        """
        await self._request("POST", "/sleep?level=2&mode=abort", timeout_s=self._transfer_timeout_s)

    async def wake_up(self, part: Literal["weights", "kv_cache"]) -> None:
        """Have the memory of `part` again, with nothing in it: the weights first, to be pushed.

        With the cache, requests go on. Raises ServerError when the server does not wake up.
        """
        path = f"/wake_up?tags={part}"
        answer = await self._request("POST", path)
        with self._expected(path, answer):
            status = answer["status"]
        if part == "kv_cache" and status != "awake":
            raise ServerError(path, 200, f"the server is still {status}; wake its weights first")

    async def reset_prefix_cache(self, running: bool = False) -> None:
        """Forget cached keys and values; `running` also recomputes those of running requests.

        Raises ServerError when running requests still hold blocks and `running` is False.
        """
        path = f"/reset_prefix_cache?reset_running_requests={str(running).lower()}"
        answer = await self._request("POST", path)
        with self._expected(path, answer):
            is_reset = answer["success"]
        if not is_reset:
            raise ServerError(path, 200, "running requests hold the cache; pause first")

    async def init_transfer(
        self,
        senders: list[dict[str, Any]],
        num_workers: int,
        timeout_s: float = 300.0,
        *,
        first_worker: int = 0,
    ) -> None:
        """Join the workers to each sender's group; returns when all groups are up.

        senders: the address of every `Sender`, in the order of their numbers.
        num_workers: of a group, all servers together; this one's begin with `first_worker`.
        timeout_s: how long a worker waits for a sender, here and in every broadcast.
        """
        self._transfer_timeout_s = timeout_s + _MARGIN_S
        body = {
            "senders": senders,
            "num_workers": num_workers,
            "first_worker": first_worker,
            "timeout_s": timeout_s,
        }
        await self._request("POST", CONNECT_PATH, body, self._transfer_timeout_s)

    async def start_weight_update(self) -> None:
        """Raise ServerError unless the server is paused: nothing may be sampled meanwhile."""
        answer = await self._request("GET", "/is_paused")
        with self._expected("/is_paused", answer):
            is_paused = answer["is_paused"]
        if not is_paused:
            raise ServerError("start_weight_update", 400, "pause the server first")

    async def update_weights(self, buckets: list[dict[str, Any]]) -> None:
        """Receive the buckets, in this order, from their senders; blocks until all are loaded."""
        await self._request("POST", UPDATE_PATH, {"buckets": buckets}, self._transfer_timeout_s)

    async def finish_weight_update(self, weight_version: int) -> None:
        """Name the version of the weights that were loaded."""
        await self._request("POST", "/update_weight_version", {"new_version": str(weight_version)})
        self._version = weight_version

    async def weight_version(self) -> int:
        """Return the version of the last finished update; 0 before the first."""
        answer = await self._request("GET", "/weight_info", timeout_s=_ANSWER_S)
        with self._expected("/weight_info", answer):
            return version_number(answer["weight_version"])

    async def model_path(self) -> str:
        """Return the folder that the server loaded, by its own name for it."""
        answer = await self._request("GET", "/v1/models", timeout_s=_ANSWER_S)
        with self._expected("/v1/models", answer):
            return str(answer["data"][0]["root"])

    async def _request(
        self, method: str, path: str, body: Any = None, timeout_s: float | None = None
    ) -> Any:
        timeout_s = timeout_s or self.timeout_s
        try:
            answer = await self._sent(method, path, body, timeout_s)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise await self._unreachable(error, f"{timeout_s:g} s") from error
        try:
            return json.loads(answer) if answer else None
        except ValueError:  # some other program's page
            raise self._refused(path, 200, _message(answer)) from None

    @contextlib.contextmanager
    def _expected(self, path: str, answer: Any) -> Iterator[None]:
        """Have the reading of an answer raise ServerError, where it is not a rollout server's."""
        try:
            yield
        except (LookupError, TypeError, ValueError):
            told = f"{str(answer)[:_SHOWN]} is no rollout server's answer"
            raise self._refused(path, 200, told) from None

    async def _sent(self, method: str, path: str, body: Any, timeout_s: float) -> bytes:
        """Return the answer. Raises ServerError, aiohttp.ClientError, TimeoutError."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S)
        url, headers = self.url + path, self._headers
        async with aiohttp.request(
            method, url, json=body, headers=headers, timeout=timeout
        ) as response:
            answer = await response.read()
            if response.status != 200:
                raise self._refused(path, response.status, _message(answer))
            return answer

    def _refused(self, path: str, status: int, message: str) -> ServerError:
        if status >= 500 and self.log_path is not None:
            message += f" (log: {self.log_path})"
        return ServerError(path, status, message)

    async def _unreachable(self, error: Exception, limit: str) -> ServerLost:
        """Return the error for a server that does not answer, with the end of its log.

        limit: how long it was waited for, or how often it was asked.
        """
        message = f"the rollout server at {self.url} does not answer ({type(error).__name__})"
        if self.log_path is not None:
            last = await asyncio.to_thread(_end_of, self.log_path)
            if last:
                return ServerLost("\n  ".join([f"{message}. The end of {self.log_path}:", *last]))
        cause = str(error) or f"nothing within {limit}"
        return ServerLost(f"{message}: {cause}. Is the server running?")


def _end_of(log: Path) -> list[str]:
    """Return the log's last lines; none where it is gone, as when a new one takes its place."""
    try:
        return log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []


def _message(payload: bytes) -> str:
    """Return the message that vLLM, FastAPI or our own layer put into an error's body."""
    text = payload.decode(errors="replace")
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text.strip() or "no message"

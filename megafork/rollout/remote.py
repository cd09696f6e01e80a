"""A replica's worker as rank 0 sees it from elsewhere: one HTTP route a method, JSON both ways.

No tokens are in it, but those of prompts and one summary a response.
"""

from __future__ import annotations

import hmac
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import aiohttp
from aiohttp import web

from megafork.data.prompts import Prompt
from megafork.errors import UserError
from megafork.rollout.client import ServerError
from megafork.rollout.sampling import UNANSWERED, Completion
from megafork.rollout.worker import RolloutWorker
from megafork.sample import GroupSummary, SampleSummary

_PATH = "/megafork/worker/"
_MARGIN_S = 60.0
"""Over what the worker allows its own requests, whose cause is the better one"""
_LONGEST_S = 6 * 3600.0
"""Of whatever else: verifiers have deadlines of their own, and journals are read whole"""
_CONNECT_S = 30.0


class WorkerLost(Exception):
    """The replica's first rank does not answer: it has ended, or hangs."""


class RemoteWorker:
    """See `Worker`. causes: where the first cause of each kind of a verifier's failures is noted.

    Raises WorkerLost, and what the worker raises.
    """

    def __init__(
        self, url: str, api_key: str, rank: int, timeout_s: float, causes: dict[str, str]
    ) -> None:
        self.url, self.rank, self.causes = url, rank, causes
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._ask_timeout_s = timeout_s + _MARGIN_S

    async def ask(self, url: str, body: dict[str, Any]) -> list[Completion]:
        found = await self._call("ask", url=url, body=body)
        return [
            replace(
                UNANSWERED, finish_reason=reason, versions=[(v, first) for v, first in versions]
            )
            for reason, versions in found
        ]

    async def judge(
        self, prompt: Prompt, name: str, policy_version: int, *, answered: bool
    ) -> tuple[GroupSummary, float]:
        group, seconds = await self._call(
            "judge",
            prompt=asdict(prompt),
            name=name,
            policy_version=policy_version,
            answered=answered,
        )
        return _summary(group), seconds

    async def keep(self, prompt_index: int, step: int) -> None:
        await self._call("keep", prompt_index=prompt_index, step=step)

    async def begin(self, step: int, position: int, pending: Sequence[int]) -> list[GroupSummary]:
        found = await self._call("begin", step=step, position=position, pending=list(pending))
        return [_summary(group) for group in found]

    async def recall(self, references: Sequence[tuple[int, int]]) -> list[GroupSummary]:
        found = await self._call("recall", references=list(references))
        return [_summary(group) for group in found]

    async def judge_again(self, prompt: Prompt, step: int) -> GroupSummary:
        return _summary(await self._call("judge_again", prompt=asdict(prompt), step=step))

    async def forget(self, prompt_indices: Sequence[int]) -> None:
        await self._call("forget", prompt_indices=list(prompt_indices))

    async def _call(self, method: str, **arguments: Any) -> Any:
        limit = self._ask_timeout_s if method == "ask" else _LONGEST_S
        timeout = aiohttp.ClientTimeout(total=limit, sock_connect=_CONNECT_S)
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session,
                session.post(self.url + _PATH + method, json=arguments) as response,
            ):
                response.raise_for_status()
                answer = await response.json()
        except aiohttp.ServerTimeoutError as error:
            raise self._lost(f"does not answer within {_CONNECT_S:g} s") from error
        except TimeoutError as error:
            raise self._lost(f"does not answer within {limit:g} s") from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            # Words of another process's end, whose cause is told by itself (last_words.py).
            raise self._lost(f"does not answer: connection closed, {error!r}") from error
        except aiohttp.ClientError as error:
            raise self._lost(f"does not answer: {error!r}") from error
        for kind, cause in answer["causes"].items():
            self.causes.setdefault(kind, cause)
        if "failure" in answer:
            raise _exception(*answer["failure"])
        return answer["value"]

    def _lost(self, why: str) -> WorkerLost:
        return WorkerLost(f"rank {self.rank}, which has its replica's responses, {why}: {self.url}")


async def serve(worker: RolloutWorker, host: str, api_key: str) -> str:
    """Answer `RemoteWorker`s on the running event loop for as long as it runs. Returns the URL."""
    wanted = f"Bearer {api_key}".encode()

    async def answer(request: web.Request) -> web.Response:
        if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), wanted):
            raise web.HTTPUnauthorized
        method = request.match_info["method"]
        if method not in _METHODS:
            raise web.HTTPNotFound
        told: dict[str, Any] = {}
        try:
            told["value"] = await _METHODS[method](worker, await request.json())
        except Exception as error:  # rank 0 raises it
            told["failure"] = _failure(error)
        return web.json_response(told | {"causes": worker.verdict.causes})

    app = web.Application(client_max_size=0)  # of any size
    app.router.add_post(_PATH + "{method}", answer)
    # A call that rank 0 gives up is given up here too, and so is the server's request.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, 0, backlog=4096)
    await site.start()
    port = runner.addresses[0][1]
    return f"http://{host}:{port}"


async def _ask(worker: RolloutWorker, given: dict[str, Any]) -> Any:
    return [[c.finish_reason, c.versions] for c in await worker.ask(**given)]


async def _judge(worker: RolloutWorker, given: dict[str, Any]) -> Any:
    group, seconds = await worker.judge(**given | {"prompt": Prompt(**given["prompt"])})
    return [asdict(group), seconds]


async def _keep(worker: RolloutWorker, given: dict[str, Any]) -> Any:
    await worker.keep(**given)


async def _begin(worker: RolloutWorker, given: dict[str, Any]) -> Any:
    return [asdict(group) for group in await worker.begin(**given)]


async def _recall(worker: RolloutWorker, given: dict[str, Any]) -> Any:
    references = [(index, step) for index, step in given["references"]]
    return [asdict(group) for group in await worker.recall(references)]


async def _judge_again(worker: RolloutWorker, given: dict[str, Any]) -> Any:
    return asdict(await worker.judge_again(**given | {"prompt": Prompt(**given["prompt"])}))


async def _forget(worker: RolloutWorker, given: dict[str, Any]) -> Any:
    await worker.forget(**given)


_METHODS = {
    "ask": _ask,
    "judge": _judge,
    "keep": _keep,
    "begin": _begin,
    "recall": _recall,
    "judge_again": _judge_again,
    "forget": _forget,
}


def _summary(fields: dict[str, Any]) -> GroupSummary:
    samples = [
        SampleSummary(**sample | {"versions": tuple(map(tuple, sample["versions"]))})
        for sample in fields["samples"]
    ]
    return GroupSummary(**fields | {"samples": samples})


def _failure(error: Exception) -> list[Any]:
    """For `_exception`, on the other side: what kind it is, and what it says."""
    if isinstance(error, ServerError):
        return ["server", error.path, error.status, error.message]
    if isinstance(error, UserError):
        return ["user", str(error)]
    if isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError):
        return ["connection", f"{type(error).__name__}: {error}"]
    if isinstance(error, TimeoutError):
        return ["timeout"]
    first = f"{type(error).__name__}: {error}\n"  # the line that a job ends with
    return ["other", first + "".join(traceback.format_exception(error))]


def _exception(kind: str, *words: Any) -> Exception:
    if kind == "server":
        return ServerError(*words)
    if kind == "user":
        return UserError(*words)
    if kind == "connection":
        return aiohttp.ClientConnectionError(*words)
    if kind == "timeout":
        return TimeoutError()
    return RuntimeError(words[0])

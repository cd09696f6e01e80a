"""A rollout server that is up in two seconds: it samples from a small Qwen3, and is no vLLM.

It has the routes, the answers and the errors of a server that `VllmServer` starts, and takes
weights by the product's own receiver. tests/servers/test_rollout.py asks both the same questions.
`commands.tiny_engine` gives what stands for a Python that has vLLM. Requests may not cut the
distribution (top_p and its like) nor ask for two temperatures.

One thread does everything but the transfer of weights: a step of the model for all running
sequences, then whatever the event loop has to do, then the next step.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from multidict import MultiMapping
from torch import Tensor

from megafork.data.sample import Sample
from megafork.rollout.sampling import (
    ABORT_PATH,
    CONNECT_PATH,
    GENERATE_PATH,
    TWO_TEMPERATURES,
    UPDATE_PATH,
    encode_samples,
    version_number,
)
from megafork.vllm_plugin.bodies import OWN_PATHS, check_tokens, parsed_body
from megafork.vllm_plugin.receiver import WeightReceiver, checkpoint_shapes
from tests.helpers.commands import HOLD, HOLD_START
from tests.helpers.tiny_model import TinyModel

UNCUT = {
    "top_p": (1.0,),
    "top_k": (-1, 0),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
}
GREEDY = 1e-5
"""A temperature below it is greedy, as in vLLM"""
PREFILL_TOKENS = 8192
BODY_BYTES = 1 << 28
LOOK_S = 0.01

Query = MultiMapping[str]
Body = dict[str, Any]


class Hold:
    """Stops the engine in the middle of its responses, for a test; see `commands.Moment`.

    Once it has answered as many groups (requests of several responses) with the weights V as the
    file hold-V in the folder says, it makes a file held-V-PID, and goes on when hold-V is gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_groups: Counter[int] = Counter()
        self._held_by: Path | None = None

    def holds(self, version: int) -> bool:
        if self._held_by is None:
            path = self.folder / f"hold-{version}"
            if not path.exists() or self.num_groups[version] < int(path.read_text()):
                return False
            self._held_by = path  # whatever weights come meanwhile
            (self.folder / f"held-{version}-{os.getpid()}").touch()
        if not self._held_by.exists():
            self._held_by = None
        return self._held_by is not None


@dataclass(eq=False)
class Sequence:
    """One response, and its prompt before it."""

    ids: list[int]
    num_prompt: int
    uniforms: list[float]
    """A random number in [0, 1) for each token to come"""
    num_cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(eq=False)
class Request:
    params: dict[str, Any]
    sequences: list[Sequence]
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, reason: str) -> None:
        """Of every sequence that has not ended."""
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or reason
        self.finished.set()


class Engine:
    """Samples from the model for all requests at once, oldest first, at most max_num_seqs."""

    def __init__(self, model: TinyModel, max_num_seqs: int, max_model_len: int, seed: int) -> None:
        self.model = model
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.weight_version = "default"
        self.paused: str | None = None
        """With "new" what runs goes on, and nothing begins; with "all" nothing is sampled."""
        self.asleep: set[str] = set()
        self.requests: dict[str, list[Request]] = {}
        self.waiting: deque[tuple[Request, Sequence]] = deque()
        self.running: list[tuple[Request, Sequence]] = []
        """The index is the row of the model's cache."""
        self.hold: Hold | None = None
        self._unseeded = torch.Generator().manual_seed(seed)
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()

    # ------------------------------------------------------------------ requests

    async def generate(self, name: str, prompt: list[int], params: dict[str, Any]) -> Request:
        """The request when it has ended. Cancelled, it is forgotten."""
        self._check(prompt, params)
        request = Request(params, [self._sequence(prompt, params, i) for i in range(params["n"])])
        self.requests.setdefault(name, []).append(request)
        self.waiting.extend((request, sequence) for sequence in request.sequences)
        self._changed.set()
        try:
            await request.finished.wait()
        finally:
            request.end("abort")
            self.requests[name].remove(request)
            if not self.requests[name]:
                del self.requests[name]
            self._drop_ended()
        return request

    def _check(self, prompt: list[int], params: dict[str, Any]) -> None:
        for token in prompt:
            if not 0 <= token < self.model.vocab_size:
                raise ValueError(
                    f"prompt token {token} is not in the vocabulary of {self.model.vocab_size}"
                )
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room for a response: the maximum "
                f"model length is {self.max_model_len}"
            )
        if TWO_TEMPERATURES in (params.get("extra_args") or {}):
            raise ValueError("this server was started without two_temperatures")
        for key, neutral in UNCUT.items():
            if params[key] not in neutral:
                raise ValueError(f"the tiny engine knows no {key}={params[key]}")
        if params["n"] < 1 or params["max_tokens"] < 1 or params["temperature"] < 0:
            raise ValueError("n and max_tokens are at least 1, the temperature at least 0")

    def _sequence(self, prompt: list[int], params: dict[str, Any], index: int) -> Sequence:
        generator = self._unseeded
        if params["seed"] is not None:
            generator = torch.Generator().manual_seed(params["seed"] + index)
        count = min(params["max_tokens"], self.max_model_len - len(prompt))
        uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
        return Sequence(list(prompt), len(prompt), uniforms.tolist())

    def abort(self, names: Iterable[str]) -> None:
        """They have ended with what they have; names that nobody knows are let be."""
        for name in names:
            for request in self.requests.get(name, ()):
                request.end("abort")
        self._drop_ended()

    # ------------------------------------------------------------------ administration

    async def pause(self, mode: str) -> None:
        if mode not in ("wait", "abort", "keep"):
            raise ValueError(f"Invalid pause mode: {mode}")
        if mode == "abort":
            self.abort(list(self.requests))
        self.paused = "all" if mode == "keep" else "new"
        while mode == "wait" and self.running:
            self._drained.clear()
            await self._drained.wait()

    def resume(self) -> None:
        self.paused = None
        self._changed.set()

    def sleep(self) -> None:
        """All memory is given up: nothing is sampled before it was awake, and pushed to."""
        self.abort(list(self.requests))
        self.paused, self.asleep = "new", {"weights", "kv_cache"}
        self.model.forget_weights()

    def wake_up(self, parts: Iterable[str]) -> bool:
        """Whether all of it is awake."""
        self.asleep -= set(parts)
        if not self.asleep:
            self.resume()
        return not self.asleep

    def reset_cache(self, running: bool) -> bool:
        for _, sequence in self.running if running else ():
            sequence.num_cached = 0
        return running or not self.running

    # ------------------------------------------------------------------ sampling

    async def run(self) -> None:
        while True:
            self._changed.clear()
            if not self._can_step():
                await self._changed.wait()
            elif self.hold is not None and self.hold.holds(version_number(self.weight_version)):
                await asyncio.sleep(LOOK_S)
            else:
                self._step()
                await asyncio.sleep(0)

    def _can_step(self) -> bool:
        if self.paused == "all" or self.asleep:
            return False
        return bool(self.running or (self.waiting and self.paused is None))

    def _step(self) -> None:
        """A token for every running sequence."""
        while self.paused is None and self.waiting and len(self.running) < self.max_num_seqs:
            self.running.append(self.waiting.popleft())
        self._fill_cache()
        sequences = [sequence for _, sequence in self.running]
        logits_RV = self.model.decode(
            [sequence.ids[-1] for sequence in sequences],
            [len(sequence.ids) - 1 for sequence in sequences],
        )
        temperatures = [request.params["temperature"] for request, _ in self.running]
        uniforms = [s.uniforms[len(s.ids) - s.num_prompt] for s in sequences]
        tokens, logprobs = sampled(logits_RV, temperatures, uniforms)
        for (request, sequence), token, logprob in zip(self.running, tokens, logprobs, strict=True):
            self._append(request, sequence, token, logprob)
        self._drop_ended()

    def _fill_cache(self) -> None:
        """Of those that are new, and those whose cache was reset."""
        stale = [
            (row, sequence.ids[:-1])
            for row, (_, sequence) in enumerate(self.running)
            if sequence.num_cached < len(sequence.ids) - 1
        ]
        size = max(1, PREFILL_TOKENS // max((len(ids) for _, ids in stale), default=1))
        for start in range(0, len(stale), size):
            rows, ids = zip(*stale[start : start + size], strict=True)
            self.model.prefill(ids, list(rows))

    def _append(self, request: Request, sequence: Sequence, token: int, logprob: float) -> None:
        version = version_number(self.weight_version)
        if not sequence.versions or sequence.versions[-1][0] != version:
            sequence.versions.append((version, len(sequence.logprobs)))
        sequence.num_cached = len(sequence.ids)
        sequence.ids.append(token)
        sequence.logprobs.append(logprob)
        if token in request.params["stop_token_ids"]:
            sequence.finish_reason = "stop"
        elif len(sequence.logprobs) == len(sequence.uniforms):
            sequence.finish_reason = "length"
        if sequence.finish_reason and all(s.finish_reason for s in request.sequences):
            request.finished.set()
            if self.hold is not None and len(request.sequences) > 1:
                self.hold.num_groups[version] += 1

    def _drop_ended(self) -> None:
        """Of those that run, the last ones take the rows of those that ended."""
        self.waiting = deque(entry for entry in self.waiting if not entry[1].finish_reason)
        row = 0
        while row < len(self.running):
            if not self.running[row][1].finish_reason:
                row += 1
                continue
            last = self.running.pop()
            if row < len(self.running):
                self.model.move(len(self.running), row)
                self.running[row] = last
        if not self.running:
            self._drained.set()


@torch.inference_mode()
def sampled(
    logits_RV: Tensor, temperatures: list[float], uniforms: list[float]
) -> tuple[list[int], list[float]]:
    """Each row's token, by its own random number, and the token's log-probability."""
    temperature_R = torch.tensor(temperatures)
    greedy_R = temperature_R < GREEDY
    logprobs_RV = (logits_RV / temperature_R.masked_fill(greedy_R, 1.0)[:, None]).log_softmax(-1)
    if logprobs_RV.isnan().any():
        raise RuntimeError("the logits are NaN: are all weights there?")
    cumulative_RV = logprobs_RV.double().exp().cumsum(-1)
    drawn_R1 = torch.tensor(uniforms, dtype=torch.float64)[:, None] * cumulative_RV[:, -1:]
    token_R = torch.searchsorted(cumulative_RV, drawn_R1, right=True)[:, 0]
    token_R = torch.where(greedy_R, logits_RV.argmax(-1), token_R)
    return token_R.tolist(), logprobs_RV.gather(-1, token_R[:, None])[:, 0].tolist()


class WorkerError(RuntimeError):
    """Why weights were not received."""


class TinyServer:
    """The routes, behind a key. A failure becomes the answer that vLLM, or our layer in it, gives.

    Weights come in a thread of their own, so that the server answers meanwhile.
    """

    def __init__(self, engine: Engine, folder: Path, key: str) -> None:
        self.engine, self.folder = engine, folder
        self._authorization = f"Bearer {key}".encode()
        self._receiver: WeightReceiver | None = None
        self._routes = {
            ABORT_PATH: self._abort,
            CONNECT_PATH: self._connect,
            UPDATE_PATH: self._update,
            "/pause": self._pause,
            "/resume": self._resume,
            "/is_paused": self._is_paused,
            "/sleep": self._sleep,
            "/wake_up": self._wake_up,
            "/reset_prefix_cache": self._reset_prefix_cache,
            "/update_weight_version": self._update_weight_version,
            "/weight_info": self._weight_info,
            "/v1/models": self._models,
        }

    async def answer(self, request: web.Request) -> web.Response:
        if request.raw_path == "/health":
            return web.Response()
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, self._authorization):
            return _error(401, "Unauthorized")
        path = request.path
        if path != GENERATE_PATH and path not in self._routes:
            return _error(404, "Not Found")
        try:
            content = await request.read() or b"{}"
            body = parsed_body(path, content) if path in OWN_PATHS else json.loads(content)
            if path == GENERATE_PATH:
                check_tokens(body["prompt_ids"], self.engine.model.vocab_size)
                return web.Response(body=await self._generate(body))
            return web.json_response(await self._routes[path](request.query, body))
        except WorkerError as error:
            return _error(500, str(error))
        except (ValueError, TypeError, KeyError) as error:
            return _error(400, f"{type(error).__name__}: {error}")

    async def _generate(self, body: dict[str, Any]) -> bytes:
        params = body["sampling_params"]
        request = await self.engine.generate(body["request_id"], body["prompt_ids"], params)
        return encode_samples(
            [
                Sample.from_server(s.ids[s.num_prompt :], s.logprobs, s.finish_reason, s.versions)
                for s in request.sequences
            ]
        )

    async def _abort(self, query: Query, body: Body) -> Body:
        self.engine.abort(body["request_ids"])
        return {}

    async def _pause(self, query: Query, body: Body) -> Body:
        await self.engine.pause(query.get("mode", "abort"))
        return {"status": "paused"}

    async def _resume(self, query: Query, body: Body) -> Body:
        self.engine.resume()
        return {"status": "resumed"}

    async def _is_paused(self, query: Query, body: Body) -> Body:
        return {"is_paused": self.engine.paused is not None}

    async def _sleep(self, query: Query, body: Body) -> Body:
        self.engine.sleep()
        return {"status": "sleeping"}

    async def _wake_up(self, query: Query, body: Body) -> Body:
        is_awake = self.engine.wake_up(query.getall("tags"))
        return {"status": "awake" if is_awake else "sleeping"}

    async def _reset_prefix_cache(self, query: Query, body: Body) -> Body:
        running = query.get("reset_running_requests") == "true"
        return {"success": self.engine.reset_cache(running)}

    async def _update_weight_version(self, query: Query, body: Body) -> Body:
        self.engine.weight_version = body["new_version"]
        return {"success": True}

    async def _weight_info(self, query: Query, body: Body) -> Body:
        return {"weight_version": self.engine.weight_version}

    async def _models(self, query: Query, body: Body) -> Body:
        return {"data": [{"id": "policy", "root": str(self.folder)}]}

    # ------------------------------------------------------------------ weights

    async def _connect(self, query: Query, body: Body) -> Body:
        def connect() -> None:
            self._receiver = WeightReceiver(
                body["senders"],
                rank=1 + body.get("first_worker", 0),
                num_workers=body["num_workers"],
                device=torch.device("cpu"),
                shapes=checkpoint_shapes(self.folder, tied=self.engine.model.tied),
                timeout_s=body["timeout_s"],
            )

        return await _in_a_thread(connect)

    async def _update(self, query: Query, body: Body) -> Body:
        if self.engine.paused is None:
            raise ValueError("pause the server before its weights change")

        def update() -> None:
            assert self._receiver is not None, "no sender is connected"
            assert "weights" not in self.engine.asleep, "wake the weights first"
            self._receiver.update(body["buckets"], self._load)

        return await _in_a_thread(update)

    def _load(self, weights: Iterator[list[tuple[str, Tensor]]]) -> None:
        for bucket in weights:
            for name, tensor in bucket:
                self.engine.model.weights[name].copy_(tensor)


async def _in_a_thread(work: Callable[[], None]) -> Body:
    try:
        await asyncio.to_thread(work)
    except Exception as error:
        traceback.print_exc()  # into the server's log
        raise WorkerError(f"worker 0: {type(error).__name__}: {error}") from error
    return {}


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


async def serve(server: TinyServer, host: str, port: int) -> None:
    """Until the process is killed, or the engine fails."""
    app = web.Application(client_max_size=BODY_BYTES)
    app.router.add_route("*", "/{path:.*}", server.answer)
    # Who hangs up wants no answer: the request is cancelled.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    await server.engine.run()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options, _ = parser.parse_known_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    model = TinyModel(options.model, dtype, options.max_num_seqs, options.max_model_len)
    engine = Engine(model, options.max_num_seqs, options.max_model_len, options.seed)
    if folder := os.environ.get(HOLD):
        engine.hold = Hold(Path(folder))
        while (engine.hold.folder / HOLD_START).exists():
            time.sleep(LOOK_S)
    server = TinyServer(engine, options.model, os.environ["VLLM_API_KEY"])
    print(f"tiny engine: {options.model} at {options.host}:{options.port}", flush=True)
    asyncio.run(serve(server, options.host, options.port))


if __name__ == "__main__":
    assert sys.argv[1:3] == ["-m", "megafork.vllm_plugin.serve"], sys.argv
    main(sys.argv[3:])

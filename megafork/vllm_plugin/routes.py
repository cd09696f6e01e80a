"""megafork's additions to a vLLM server: one ASGI layer, and two methods of each worker.

Imported by the server's processes alone, possibly under another environment's Python, so nothing
of megafork that needs megatron may be imported here.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from megafork.data.sample import Sample
from megafork.ops import bfloat16_products
from megafork.rollout.sampling import (
    ABORT_PATH,
    CONNECT_PATH,
    GENERATE_PATH,
    TWO_TEMPERATURES,
    UPDATE_PATH,
    encode_samples,
    version_number,
)
from megafork.vllm_plugin.bodies import ENGINE_PATHS, check_tokens, parsed_body
from megafork.vllm_plugin.pulse import Pulse
from megafork.vllm_plugin.receiver import WeightReceiver, checkpoint_shapes, listed

if current_platform.is_cpu():
    bfloat16_products.replace_where_slow(few_rows=8)


class RolloutMiddleware:
    """Demands the API key on every route but /health, and answers megafork's own routes.

    vLLM's own check covers /v1 but not the routes that pause the engine or change its weights. Only
    those of vLLM's routes are open that a run uses.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._authorization = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
        self._pulse = Pulse(_one_token)

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        path = scope.get("path")
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if path == "/health":
            return await self._tell_health(scope, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._authorization):
            return await _reply_error(send, 401, "Unauthorized")
        if path in ENGINE_PATHS:
            with self._pulse.administration():
                return await self.app(scope, receive, send)
        if path not in _ROUTES:
            return await _reply_error(send, 404, f"there is no {path}")
        engine = scope["app"].state.engine_client
        try:
            body = parsed_body(path, await _read_body(receive))
            with (
                self._pulse.generation()
                if path == GENERATE_PATH
                else (self._pulse.administration())
            ):
                answer = asyncio.ensure_future(_ROUTES[path](engine, body))
                payload = await _unless_disconnected(answer, receive)
        except _WorkerError as error:
            return await _reply_error(send, 500, str(error))
        except (ValueError, TypeError, KeyError, VLLMClientError) as error:
            return await _reply_error(send, 400, f"{type(error).__name__}: {error}")
        if payload is not None:
            await _reply(send, 200, payload, b"application/octet-stream")

    async def _tell_health(self, scope: dict, send: Any) -> None:
        ailment = await self._pulse.ailment(scope["app"].state.engine_client)
        if ailment is not None:
            return await _reply_error(send, 503, ailment)
        await _reply(send, 200, b"")


async def _one_token(engine: Any) -> None:
    """Have the engine generate one token, greedily: it takes no random number from other requests.

    The prompt has sixteen tokens, because a bfloat16 engine on a CPU ends at prompts of one or two.
    """
    prompt = tokens_input([0] * min(16, engine.model_config.max_model_len - 1))
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for _ in engine.generate(prompt, params, f"health-{uuid.uuid4().hex}"):
        pass


async def _generate(engine: Any, body: dict[str, Any]) -> bytes:
    check_tokens(body["prompt_ids"], engine.model_config.get_vocab_size())
    extra = body["sampling_params"].get("extra_args") or {}
    if TWO_TEMPERATURES in extra and not engine.model_config.logits_processors:
        # Sampling at a temperature of 1 without a word would be worse.
        raise ValueError("this server was started without two_temperatures")
    params = SamplingParams(
        **body["sampling_params"], output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True
    )
    prompt = tokens_input(body["prompt_ids"])
    result = None
    async for output in engine.generate(prompt, params, body["request_id"]):
        result = output
    assert result is not None and result.finished
    return encode_samples(
        [
            Sample.from_server(
                np.array(o.token_ids, np.int32),
                # Without any where it was aborted before the first token.
                np.array(o.logprobs.logprobs if o.token_ids else (), np.float32),
                o.finish_reason,
                [(version_number(span.version), span.start) for span in o.weight_versions or []],
            )
            for o in result.outputs
        ]
    )


async def _abort(engine: Any, body: dict[str, Any]) -> bytes:
    """End requests; each is answered with what it has, finish_reason "abort"."""
    await engine.abort(body["request_ids"])
    return b"{}"


async def _connect(engine: Any, body: dict[str, Any]) -> bytes:
    return await _on_all_workers(engine, "megafork_connect", body)


async def _update(engine: Any, body: dict[str, Any]) -> bytes:
    if not await engine.is_paused():
        raise ValueError("pause the server before its weights change")
    return await _on_all_workers(engine, "megafork_update", body)


_ROUTES = {
    GENERATE_PATH: _generate,
    ABORT_PATH: _abort,
    CONNECT_PATH: _connect,
    UPDATE_PATH: _update,
}


async def _on_all_workers(engine: Any, method: str, arguments: dict[str, Any]) -> bytes:
    failures = await engine.collective_rpc(method, kwargs=arguments)
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise _WorkerError(f"worker {rank}: {failure}")
    return b"{}"


class _WorkerError(RuntimeError):
    """A failure of a worker, with the reason that it gave back."""


async def _unless_disconnected(answer: asyncio.Future, receive: Any) -> bytes | None:
    """Return the answer; None when the client went away, which aborts what it asked for."""
    disconnected = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({answer, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        disconnected.cancel()
        answer.cancel()


async def _read_body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _reply_error(send: Any, status: int, message: str) -> None:
    await _reply(send, status, json.dumps({"error": {"message": message}}).encode())


async def _reply(
    send: Any, status: int, body: bytes, content_type: bytes = b"application/json"
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --------------------------------------------------------------------------- weight transfer


class WorkerExtension:
    """A mix-in of vLLM's worker, whose methods are called on all workers of the server at once.

    They give a failure back as text: with several workers, vLLM reads one exception alone, and
    takes the second worker's for the answer to the next call.
    """

    rank: int  # these are the worker's
    device: torch.device
    vllm_config: VllmConfig
    model_runner: Any

    def megafork_connect(
        self,
        senders: list[dict[str, Any]],
        num_workers: int,
        timeout_s: float,
        first_worker: int = 0,
    ) -> str | None:
        """Join the group of every sender, leaving former groups.

        num_workers: of all servers together; this server's begin with `first_worker`.
        """

        def connect() -> None:
            folder = Path(self.vllm_config.model_config.model)
            self._megafork_receiver = WeightReceiver(
                senders,
                rank=1 + first_worker + self.rank,
                num_workers=num_workers,
                device=self.device,
                shapes=checkpoint_shapes(folder, tied=self._megafork_is_tied()),
                timeout_s=timeout_s,
            )

        return _failure_of(connect)

    def megafork_update(self, buckets: list[dict[str, Any]]) -> str | None:
        """Receive and load a whole model; see `WeightReceiver.update`."""
        return _failure_of(lambda: self._megafork_receiver.update(buckets, self._megafork_load))

    def _megafork_load(self, weights: Iterator[list[tuple[str, Tensor]]]) -> None:
        """Load the weights as vLLM loads a checkpoint.

        load_weights alone would not do: prepacked or quantized kernels have replaced the
        parameters. Raises ValueError when a parameter is left unset.
        """
        model = self.model_runner.get_model()
        parameters = {name for name, _ in model.named_parameters()}
        loaded: set[str] = set()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            try:
                for bucket in weights:
                    loaded |= model.load_weights(bucket)
            finally:  # after a failure too: layers half loaded could not be loaded again
                finalize_layerwise_reload(model, self.vllm_config.model_config)
                if self._megafork_is_tied():
                    # The CPU kernels pack a copy of the head, which no weight was loaded into.
                    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        if missing := parameters - loaded:
            raise ValueError(f"the update left parameters unset: {listed(missing)}")
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _megafork_is_tied(self) -> bool:
        return getattr(self.vllm_config.model_config.hf_config, "tie_word_embeddings", False)


def _failure_of(work: Callable[[], None]) -> str | None:
    try:
        work()
    except Exception as error:
        traceback.print_exc()  # into the server's log
        return f"{type(error).__name__}: {error}"
    return None

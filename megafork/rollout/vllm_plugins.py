"""What megafork adds to a vLLM server: one ASGI layer, and the weight receiver of each worker.

Imported by the server's processes alone, possibly under another environment's Python, so nothing
of megafork that needs megatron may be imported here.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm import SamplingParams
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.sampling_params import RequestOutputKind

from megafork.rollout.sampling import GENERATE_PATH, Completion, encode_completions
from megafork.weight_sync.transports import join_group, receive_bucket


class RolloutMiddleware:
    """Demands the API key on every route but /health and answers `GENERATE_PATH`.

    vLLM's own check covers /v1 but not the routes that pause the engine or replace its weights.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._authorization = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._authorization):
            return await _reply(send, 401, b'{"error": {"message": "Unauthorized"}}')
        if scope.get("path") != GENERATE_PATH:
            return await self.app(scope, receive, send)
        try:
            body = json.loads(await _read_body(receive))
            engine = scope["app"].state.engine_client
            generation = asyncio.ensure_future(_generate(engine, body))
            payload = await _unless_disconnected(generation, receive)
        except (ValueError, TypeError, KeyError, VLLMClientError) as error:
            message = json.dumps({"error": {"message": f"{type(error).__name__}: {error}"}})
            return await _reply(send, 400, message.encode())
        if payload is not None:
            await _reply(send, 200, payload, b"application/octet-stream")


async def _generate(engine: Any, body: dict[str, Any]) -> bytes:
    vocab_size = engine.model_config.get_vocab_size()
    for token in body["prompt_ids"]:
        if not 0 <= token < vocab_size:  # without a tokenizer vLLM lets it through, and crashes
            raise ValueError(f"prompt token {token} is not in the vocabulary of {vocab_size}")
    params = SamplingParams(
        **body["sampling_params"], output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True
    )
    prompt = tokens_input(body["prompt_ids"])
    result = None
    async for output in engine.generate(prompt, params, uuid.uuid4().hex):
        result = output
    assert result is not None and result.finished
    return encode_completions(
        [
            Completion(list(o.token_ids), o.logprobs.logprobs, o.finish_reason)
            for o in result.outputs
        ]
    )


async def _unless_disconnected(generation: asyncio.Future, receive: Any) -> bytes | None:
    """The generation's result; None when the client went away, which aborts the request."""
    disconnected = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({generation, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return generation.result() if generation.done() else None
    finally:
        disconnected.cancel()
        generation.cancel()


async def _read_body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _reply(
    send: Any, status: int, body: bytes, content_type: bytes = b"application/json"
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --------------------------------------------------------------------------- weight transfer


class WorkerExtension:
    """Adds nothing to vLLM's worker: naming it makes each worker import this module."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    senders: list[dict[str, Any]]  # {"host", "port"} of each sender's store
    num_workers: int
    timeout_s: float = 300.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    buckets: list[dict[str, Any]]  # see transports.plan_buckets; all of the model's, in order


class WeightReceiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives whole models in Hugging Face names and loads them as vLLM loads a checkpoint.

    An update that fails leaves weights of both policies behind and closes the groups; the next
    complete update, over new groups, mends the model.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: list[Any] = []
        self._parameters = {name for name, _ in self.model.named_parameters()}
        tied = getattr(self.model_config.hf_config, "tie_word_embeddings", False)
        self._tied_head = self.model.lm_head if tied else None
        self._shapes = _checkpoint_shapes(Path(self.model_config.model))
        if tied:
            self._shapes.pop("lm_head.weight", None)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        rank, world_size = 1 + self.parallel_config.rank, 1 + init_info.num_workers
        for sender in init_info.senders:
            group = join_group(
                sender["host"], sender["port"], rank, world_size, self.device, init_info.timeout_s
            )
            self._groups.append(group)

    def start_weight_update(self) -> None:
        # Not model.load_weights alone: prepacked or quantized kernels have replaced the parameters.
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        try:
            self._check_plan(update_info.buckets)
            loaded: set[str] = set()
            for bucket in update_info.buckets:
                weights = receive_bucket(self._groups[bucket["sender"]], bucket, self.device)
                loaded |= self.model.load_weights(weights)
            if missing := self._parameters - loaded:
                raise ValueError(f"the update left parameters unset: {_listed(missing)}")
        except BaseException:
            self.shutdown()
            self.finish_weight_update()  # the layers back into a state that can be loaded again
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self._tied_head is not None:
            # The CPU kernels keep a packed copy of the head, which no weight was loaded into.
            self._tied_head.quant_method.process_weights_after_loading(self._tied_head)

    def shutdown(self) -> None:
        self._groups.clear()

    def _check_plan(self, buckets: list[dict[str, Any]]) -> None:
        """Names and shapes must be the checkpoint's, before anything is overwritten."""
        shapes: dict[str, tuple[int, ...]] = {}
        for bucket in buckets:
            if not 0 <= bucket["sender"] < len(self._groups):
                raise ValueError(
                    f"bucket from sender {bucket['sender']}, but {len(self._groups)} are connected"
                )
            for name, shape in zip(bucket["names"], bucket["shapes"], strict=True):
                if name in shapes:
                    raise ValueError(f"the update sends {name} twice")
                shapes[name] = tuple(shape)
        if unknown := shapes.keys() - self._shapes.keys():
            raise ValueError(f"the model has no {_listed(unknown)}")
        if missing := self._shapes.keys() - shapes.keys():
            raise ValueError(f"the update lacks {_listed(missing)}")
        for name, shape in shapes.items():
            if shape != self._shapes[name]:
                raise ValueError(f"{name} has shape {self._shapes[name]}, the update sends {shape}")


def _checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's safetensors files, from their headers."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def _listed(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


if "megafork" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("megafork", WeightReceiver)

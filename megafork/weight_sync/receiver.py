"""The worker's end of the weight transfer: from buckets into vLLM's model.

Imported by the inference server's processes alone; needs vLLM and nothing of megatron.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megafork.weight_sync.local import LocalLink
from megafork.weight_sync.transports import BroadcastLink, Bucket, Link, received


class WeightReceiver:
    """Receives whole models in Hugging Face names and loads them as vLLM loads a checkpoint.

    An update that fails leaves weights of both policies behind and closes the groups; the next
    complete update, over new groups, mends the model.
    """

    def __init__(
        self,
        worker: Any,
        senders: list[dict[str, Any]],
        num_workers: int,
        timeout_s: float,
        first_worker: int = 0,
    ) -> None:
        """num_workers: of all servers together; this server's begin with `first_worker`."""
        self.device = worker.device
        self.vllm_config = worker.vllm_config
        self.model = worker.model_runner.get_model()
        self._parameters = {name for name, _ in self.model.named_parameters()}
        model_config = self.vllm_config.model_config
        tied = getattr(model_config.hf_config, "tie_word_embeddings", False)
        self._tied_head = self.model.lm_head if tied else None
        self._shapes = _checkpoint_shapes(Path(model_config.model))
        if tied:
            self._shapes.pop("lm_head.weight", None)
        rank = 1 + first_worker + worker.rank
        self._links: list[Link] = [
            LocalLink(sender, self.device, timeout_s)
            if "socket" in sender
            else BroadcastLink(sender, rank, num_workers, self.device, timeout_s)
            for sender in senders
        ]

    def update(self, buckets: list[Bucket]) -> None:
        """Receive the buckets (see transports.plan_buckets), in this order, from their senders.

        Raises ValueError when names or shapes are not exactly the model's, TransferError when a
        sender is gone or silent.
        """
        try:
            self._check_plan(buckets)
            with set_current_vllm_config(self.vllm_config), torch.no_grad():
                self._receive(buckets)
        except BaseException:
            self._links.clear()  # the senders fail now, not at their timeout
            raise

    def _receive(self, buckets: list[Bucket]) -> None:
        # Not load_weights alone: prepacked or quantized kernels have replaced the parameters.
        initialize_layerwise_reload(self.model)
        loaded: set[str] = set()
        try:
            for weights in received(self._links, buckets):
                loaded |= self.model.load_weights(weights)
        finally:  # after a failure too: layers half loaded could not be loaded again
            finalize_layerwise_reload(self.model, self.vllm_config.model_config)
            if self._tied_head is not None:
                # The CPU kernels pack a copy of the head, which no weight was loaded into.
                self._tied_head.quant_method.process_weights_after_loading(self._tied_head)
        if missing := self._parameters - loaded:
            raise ValueError(f"the update left parameters unset: {_listed(missing)}")
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _check_plan(self, buckets: list[Bucket]) -> None:
        """Names and shapes must be the checkpoint's, before anything is overwritten."""
        shapes: dict[str, tuple[int, ...]] = {}
        for bucket in buckets:
            if not 0 <= bucket["sender"] < len(self._links):
                raise ValueError(
                    f"bucket from sender {bucket['sender']}, but {len(self._links)} are connected"
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

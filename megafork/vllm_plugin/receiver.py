"""The worker's end of the weight transfer: checks a whole model, and hands it on bucket by bucket.

Imported by the inference server's processes alone; needs torch and nothing of megatron or vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megafork.weights.local import LocalLink
from megafork.weights.transports import BroadcastLink, Bucket, Link, received

Load = Callable[[Iterator[list[tuple[str, Tensor]]]], None]
"""Takes all weights of a model in Hugging Face names, bucket by bucket as they come in"""


class WeightReceiver:
    """Receives whole models in Hugging Face names, again and again, from the same senders.

    An update that fails leaves weights of both policies behind and closes the groups; the next
    complete update, over new groups, mends the model.
    """

    def __init__(
        self,
        senders: list[dict[str, Any]],
        *,
        rank: int,
        num_workers: int,
        device: torch.device,
        shapes: dict[str, tuple[int, ...]],
        timeout_s: float,
    ) -> None:
        """rank, num_workers: of the workers of all servers together; the first one's rank is 1.
        shapes: of all weights that an update must have; see `checkpoint_shapes`."""
        self._shapes = shapes
        self._links: list[Link] = [
            LocalLink(sender, device, timeout_s)
            if "socket" in sender
            else BroadcastLink(sender, rank, num_workers, device, timeout_s)
            for sender in senders
        ]

    def update(self, buckets: list[Bucket], load: Load) -> None:
        """Receive the buckets (see transports.plan_buckets), in this order, from their senders.

        Raises ValueError when names or shapes are not exactly the model's, TransferError when a
        sender is gone or silent.
        """
        try:
            self._check_plan(buckets)
            with torch.no_grad():
                load(received(self._links, buckets))
        except BaseException:
            self._links.clear()  # the senders fail now, not at their timeout
            raise

    def _check_plan(self, buckets: list[Bucket]) -> None:
        """Require the checkpoint's names and shapes, before anything is overwritten."""
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
            raise ValueError(f"the model has no {listed(unknown)}")
        if missing := self._shapes.keys() - shapes.keys():
            raise ValueError(f"the update lacks {listed(missing)}")
        for name, shape in shapes.items():
            if shape != self._shapes[name]:
                raise ValueError(f"{name} has shape {self._shapes[name]}, the update sends {shape}")


def checkpoint_shapes(folder: Path, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Read name and shape of every tensor in the folder's safetensors files, from their headers.

    tied: the head is the embedding, whether the files repeat it or not.
    """
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                shapes[name] = tuple(file.get_slice(name).get_shape())
    if tied:
        shapes.pop("lm_head.weight", None)
    return shapes


def listed(names: set[str]) -> str:
    """List the first of the names, for messages."""
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

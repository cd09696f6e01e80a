"""The reference policy: an HF folder's weights in host memory, lent to the policy's parameters.

It has no model of its own: its weights change places with the policy's for a scoring pass, so it
runs at the same layout, through the same kernels, on the same packs, and a policy that equals it
gets the same log-probabilities bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megafork.model.hf_model import open_model
from megafork.model.scorer import Scorer
from megafork.model.weights import read_weights


class Reference:
    """This rank's shards of the reference, pinned where there is a GPU.

    It costs the host once the bytes of the rank's weights (in their dtypes), and the device, while
    the two change places, those of its largest parameter.
    """

    def __init__(self, policy: Scorer, folder: str | Path) -> None:
        """Read `folder` at the policy's layout; the policy stays as it is."""
        policy.shape.check_same_build(folder, setting="kl.reference")
        model = open_model(folder, setting="kl.reference")
        self._pairs: list[tuple[torch.nn.Parameter, Tensor]] = []
        """a parameter, and on the host what is not in it now: the reference's or the policy's"""
        pinned = policy.mesh.device.type == "cuda"
        for parameter, shard in read_weights(policy.stages, model.weights, policy.mesh):
            host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=pinned)
            self._pairs.append((parameter, host.copy_(shard)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy's parameters hold the reference's weights; after it, their own bits.

        Values are copied and nothing is rebound: megatron's parameters are views of its buffers,
        and in float32 the optimizer's main parameters are views of them. No update may be made
        inside.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, host in self._pairs:
            leaving = parameter.detach().clone()
            # In the order of one stream: the host's bytes are read before they are written.
            parameter.copy_(host, non_blocking=True)
            host.copy_(leaving, non_blocking=True)
        if self._pairs[0][0].is_cuda:
            torch.cuda.synchronize()  # no other stream may see half of it

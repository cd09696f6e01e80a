"""Device memory that is put away on the host and comes back into the same storages.

A storage keeps its identity while it has no bytes, so every view of it (megatron's parameters are
views of flat buffers, float32 main parameters views of those) is whole again when it is back. To
use a view in between is no exception but a crash of the process: whoever puts memory away answers
for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_SLAB = 256 << 20
"""Bytes. torch rounds pinned memory up to a power of two: of one large piece half could be lost."""


def storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, torch.UntypedStorage]:
    """The storages on `device` that have bytes, each once, by their address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.nbytes():
            found[storage.data_ptr()] = storage
    return found


class HostMemory:
    """Host memory, pinned where there is a GPU, for what is put away.

    It is kept between two times, as pinning takes longer than copying: it costs the host the bytes
    of the largest lot that was put away.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slabs: list[Tensor] = []
        self._away: list[tuple[torch.UntypedStorage, int]] = []

    def put_away(self, lot: Iterable[torch.UntypedStorage]) -> None:
        """Copy the storages' bytes here and release them."""
        assert not self._away, "something is away already"
        self._away = [(storage, storage.nbytes()) for storage in lot]
        missing = sum(size for _, size in self._away) - sum(len(slab) for slab in self.slabs)
        while missing > 0:
            pinned = self.device.type == "cuda"
            slab = torch.empty(min(_SLAB, missing), dtype=torch.uint8, pin_memory=pinned)
            self.slabs.append(slab)
            missing -= len(slab)
        for there, here in self._pieces():
            here.copy_(there, non_blocking=True)
        self._wait()
        for storage, _ in self._away:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Give the storages their bytes back."""
        for storage, size in self._away:
            storage.resize_(size)
        for there, here in self._pieces():
            there.copy_(here, non_blocking=True)
        self._wait()
        self._away = []

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes of a storage, the host's bytes for them): all storages, one after the other."""
        slabs = iter(self.slabs)
        room = torch.empty(0, dtype=torch.uint8)
        for storage, _ in self._away:
            left = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            while len(left):
                if not len(room):
                    room = next(slabs)
                size = min(len(left), len(room))
                yield left[:size], room[:size]
                left, room = left[size:], room[size:]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

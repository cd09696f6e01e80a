"""Weights to workers on the same machine, through memory that both processes map.

On the CPU the memory is an anonymous file (memfd_create: no name, no limit of /dev/shm, gone with
the last process that maps it, however that ends); on a GPU it is opened in the worker by CUDA's
inter-process handles, which NCCL cannot replace where both sit on one device. Two slots take turns:
the sender fills one while the workers take the other.

A worker connects to the sender's socket, in Linux' abstract namespace, and shows the token that
came with the sender's address over the server's authenticated HTTP. Then the sender tells it the
slots (a file descriptor, or handles in JSON; nothing is pickled) and, of each bucket, that it is
there; the worker answers when it has copied it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import mmap
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megafork.weights.transports import (
    Bucket,
    TransferError,
    dtype_of,
    fill,
    names_of,
    num_elements,
)

_SLOTS = 2
_THERE, _TAKEN = b"F", b"T"
_LENGTH = 4  # bytes before a message
_ALIGNED = 256  # bytes, for every dtype
_TOKEN_S = 5.0  # within which one who connects has to show the token


class LocalSender:
    """The sending end of one stage's transfers through local memory; see `transports.Sender`.

    plan: this sender's buckets; a slot holds the largest. The slots exist from the first `send` of
    a push to its `flush`. timeout_s: for connecting, and for the workers to take each bucket.
    """

    def __init__(
        self,
        sender: int,
        plan: Sequence[Bucket],
        num_workers: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.sender = sender
        self.num_workers = num_workers
        self.device = device
        self.timeout_s = timeout_s
        self.bytes_sent = 0
        largest = max(num_elements(bucket) * dtype_of(bucket).itemsize for bucket in plan)
        self.slot_bytes = -(-largest // _ALIGNED) * _ALIGNED
        self._name = f"megafork-{secrets.token_hex(8)}"
        self._token = secrets.token_hex(32)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{self._name}")
        self._listener.listen()
        self._workers: list[socket.socket] = []
        self._slots: list[Tensor] = []
        self._next = 0
        self._untaken: deque[Bucket] = deque()

    @property
    def address(self) -> dict[str, Any]:
        return {"socket": self._name, "token": self._token}

    def connect(self) -> None:
        """Block until the workers have joined; whoever shows another token is sent away."""
        deadline = time.monotonic() + self.timeout_s
        while len(self._workers) < self.num_workers:
            self._listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                worker, _ = self._listener.accept()
            except OSError as error:
                raise TransferError(
                    f"sender {self.sender}: workers did not join: {error}"
                ) from error
            if self._has_token(worker):
                worker.settimeout(self.timeout_s)
                self._workers.append(worker)
            else:
                worker.close()
        self._listener.close()

    def _has_token(self, stranger: socket.socket) -> bool:
        stranger.settimeout(_TOKEN_S)
        try:
            shown = _read(stranger, len(self._token))
        except OSError:
            return False
        return hmac.compare_digest(shown, self._token.encode())

    def send(self, bucket: Bucket, tensors: Iterable[Tensor]) -> None:
        """Copy a bucket's tensors into the next slot, and tell the workers."""
        assert self._workers, "connect() comes first"
        try:
            if not self._slots:
                self._slots = self._open()
            self._settle(leave=_SLOTS - 1)
            dtype = dtype_of(bucket)
            size = num_elements(bucket) * dtype.itemsize
            with torch.no_grad():
                fill(self._slots[self._next][:size].view(dtype), tensors)
            self._next = (self._next + 1) % _SLOTS
            _synchronize(self.device)
            for worker in self._workers:
                worker.sendall(_THERE)
        except OSError as error:
            raise self._failure(bucket, error) from error
        self._untaken.append(bucket)
        self.bytes_sent += size

    def flush(self) -> None:
        """Wait until the workers have taken every bucket, and give the slots up."""
        self._settle(leave=0)
        self._slots, self._next = [], 0
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """Leave: a worker that waits for this sender fails at once."""
        self._listener.close()
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.shutdown(socket.SHUT_RDWR)  # a forked writer of checkpoints has a copy
            worker.close()
        self._workers, self._slots, self._untaken = [], [], deque()

    def _settle(self, *, leave: int) -> None:
        while len(self._untaken) > leave:
            bucket = self._untaken.popleft()
            try:
                for worker in self._workers:
                    _read(worker, len(_TAKEN))
            except OSError as error:
                raise self._failure(bucket, error) from error

    def _open(self) -> list[Tensor]:
        """Make new slots, and tell the workers of them."""
        if self.device.type == "cuda":
            memory = torch.empty(_SLOTS, self.slot_bytes, dtype=torch.uint8, device=self.device)
            slots = list(memory)
            for worker in self._workers:  # torch counts the users of each handle that it makes
                _tell(worker, {"bytes": self.slot_bytes, "cuda": _cuda_handle(memory)})
            return slots
        file = os.memfd_create("megafork-weights")
        try:
            os.ftruncate(file, _SLOTS * self.slot_bytes)
            for worker in self._workers:
                _tell(worker, {"bytes": self.slot_bytes}, [file])
            return _map(file, self.slot_bytes)
        finally:
            os.close(file)

    def _failure(self, bucket: Bucket, error: OSError) -> TransferError:
        return TransferError(f"sender {self.sender}, bucket {names_of(bucket)}: {error}")


class LocalLink:
    """A worker's end of a `LocalSender`'s transfers."""

    def __init__(self, sender: dict[str, Any], device: torch.device, timeout_s: float) -> None:
        self.device = device
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(f"\0{sender['socket']}")
            self._socket.sendall(sender["token"].encode())
        except OSError as error:
            raise TransferError(
                f"no weight sender at the local socket {sender['socket']}: {error}; with "
                "sync.transport=local the server runs on the trainer's machine"
            ) from error
        self._slots: list[Tensor] = []
        self._next = 0
        self._coming: deque[Bucket] = deque()

    def begin(self, bucket: Bucket) -> None:
        """Note that the bucket is the next; the sender is ahead by itself."""
        self._coming.append(bucket)

    def finish(self, *, last: bool) -> Tensor:
        """Return a copy of the bucket begun first, since vLLM keeps what it cannot place yet."""
        bucket = self._coming.popleft()
        try:
            if not self._slots:
                self._slots = self._open()
            _read(self._socket, len(_THERE))
            dtype = dtype_of(bucket)
            size = num_elements(bucket) * dtype.itemsize
            flat = self._slots[self._next][:size].view(dtype).to(self.device, copy=True)
            self._next = (self._next + 1) % _SLOTS
            _synchronize(self.device)
            if last:  # before the sender is told, so that its memory is free then
                self._slots, self._next = [], 0
            self._socket.sendall(_TAKEN)
        except OSError as error:
            sender, names = bucket["sender"], names_of(bucket)
            raise TransferError(
                f"nothing received from sender {sender}, bucket {names}: {error}"
            ) from error
        return flat

    def _open(self) -> list[Tensor]:
        told, files = _hear(self._socket)
        if "cuda" in told:
            return list(_cuda_memory(told["cuda"]).split(told["bytes"]))
        try:
            return _map(files[0], told["bytes"])
        finally:
            for file in files:
                os.close(file)


def _map(file: int, slot_bytes: int) -> list[Tensor]:
    """Map the file as uint8 tensors of `slot_bytes`, which keep it mapped."""
    memory = mmap.mmap(file, _SLOTS * slot_bytes)
    return list(torch.frombuffer(memory, dtype=torch.uint8).split(slot_bytes))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = end.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the other side has left")
        data += part
    return data


def _tell(end: socket.socket, message: dict[str, Any], files: Sequence[int] = ()) -> None:
    body = json.dumps(message).encode()
    socket.send_fds(end, [len(body).to_bytes(_LENGTH, "big")], files)
    end.sendall(body)


def _hear(end: socket.socket) -> tuple[dict[str, Any], list[int]]:
    length, files, _, _ = socket.recv_fds(end, _LENGTH, 1)
    if len(length) < _LENGTH:
        for file in files:
            os.close(file)
        raise ConnectionResetError("the other side has left")
    return json.loads(_read(end, int.from_bytes(length, "big"))), files


def _cuda_handle(memory: Tensor) -> dict[str, Any]:
    """Return how another process opens the memory: parts (bytes as hex), and the GPU's identity."""
    _, *parts = memory.untyped_storage()._share_cuda_()
    encoded = [part.hex() if isinstance(part, bytes) else part for part in parts]
    return {"gpu": str(torch.cuda.get_device_properties(memory.device).uuid), "parts": encoded}


def _cuda_memory(handle: dict[str, Any]) -> Tensor:
    """Open the sender's memory as uint8 on its GPU, whatever number that has here."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == handle["gpu"]:
            break
    else:
        raise TransferError(
            f"the weight sender's GPU {handle['gpu']} is not visible to the server (see its "
            "CUDA_VISIBLE_DEVICES): make it so, or set sync.transport=broadcast"
        )
    parts = [bytes.fromhex(p) if isinstance(p, str) else p for p in handle["parts"]]
    with torch.cuda.device(index):
        memory = torch.empty(0, dtype=torch.uint8, device=f"cuda:{index}")
        return memory.set_(torch.UntypedStorage._new_shared_cuda(index, *parts))

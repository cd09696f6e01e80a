"""Moves weights from the trainer to the workers of an inference server, in flat buckets.

A sender is the leader rank of one pipeline stage. A bucket is the concatenated tensors of one
dtype; the plan of all buckets travels over HTTP, so that the workers know what comes from whom, and
in which order. The buckets travel by broadcast, in a group of {the sender as rank 0, the workers as
ranks 1..num_workers} that is built beside torch.distributed's default group, or, on one machine,
through shared memory (local.py).

Both ends work on one bucket while the next is on its way and hold two at most. The server's
processes import this module too: torch alone, no megatron, no vLLM.
"""

from __future__ import annotations

import math
import socket
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.system.rendezvous import file_store, listening_store, private_folder

Group = Any  # a ProcessGroupGloo or ProcessGroupNCCL: backends are no dist.ProcessGroup
Bucket = dict[str, Any]


class TransferError(RuntimeError):
    """A transfer failed or ran into its timeout: the other side is gone or gave up."""


class Sender(Protocol):
    """The sending end of one stage's transfers."""

    sender: int
    """its number: the pipeline stage"""
    bytes_sent: int
    """of weights, since it was made; each counts once, however many workers there are"""

    @property
    def address(self) -> dict[str, Any]:
        """The address by which a worker joins, ready for JSON."""

    def connect(self) -> None:
        """Block until the workers have joined (they do in `client.init_transfer`)."""

    def send(self, bucket: Bucket, tensors: Iterable[Tensor]) -> None:
        """Send one bucket's tensors, in the order of the plan; return when they are copied out.

        The bucket may still be on its way then, and a later call may raise its failure.
        """

    def flush(self) -> None:
        """Wait until the workers have all that was sent; no memory of it is held after that."""

    def close(self) -> None:
        """Leave: a worker that waits for this sender fails at once."""


class Link(Protocol):
    """A worker's end of one sender's transfers."""

    def begin(self, bucket: Bucket) -> None:
        """Let the bucket come in."""

    def finish(self, *, last: bool) -> Tensor:
        """Return the flat bucket that was begun first. last: it is the sender's last of a push."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def plan_buckets(
    sender: int, manifest: list[tuple[str, tuple[int, ...], torch.dtype]], max_bytes: int
) -> list[Bucket]:
    """Cut a list of (name, shape, dtype), in its order, into buckets of at most `max_bytes`.

    A bucket has one dtype; a tensor larger than `max_bytes` is a bucket alone. Each bucket is
    {"sender", "dtype", "names", "shapes"}, ready for JSON.
    """
    buckets: list[Bucket] = []
    used = 0
    for name, shape, dtype in manifest:
        size = math.prod(shape) * dtype.itemsize
        full = used + size > max_bytes
        if not buckets or full or buckets[-1]["dtype"] != dtype_name(dtype):
            buckets.append(
                {"sender": sender, "dtype": dtype_name(dtype), "names": [], "shapes": []}
            )
            used = 0
        buckets[-1]["names"].append(name)
        buckets[-1]["shapes"].append(list(shape))
        used += size
    return buckets


def dtype_of(bucket: Bucket) -> torch.dtype:
    return getattr(torch, bucket["dtype"])


def num_elements(bucket: Bucket) -> int:
    return sum(math.prod(shape) for shape in bucket["shapes"])


def names_of(bucket: Bucket) -> str:
    """Name a bucket's first and last tensor, for messages."""
    return f"{bucket['names'][0]} ... {bucket['names'][-1]}"


def fill(flat: Tensor, tensors: Iterable[Tensor]) -> None:
    """Copy the tensors, one after the other, into all of `flat`."""
    start = 0
    for tensor in tensors:
        stop = start + tensor.numel()
        flat[start:stop].view(tensor.shape).copy_(tensor)
        start = stop
    assert start == len(flat), f"{start} elements for a bucket of {len(flat)}"


def unpack(flat: Tensor, bucket: Bucket) -> list[tuple[str, Tensor]]:
    """Return each tensor as (name, view into the flat bucket)."""
    views = flat.split([math.prod(shape) for shape in bucket["shapes"]])
    shaped = (view.view(shape) for view, shape in zip(views, bucket["shapes"], strict=True))
    return list(zip(bucket["names"], shaped, strict=True))


def received(
    links: Sequence[Link], buckets: Sequence[Bucket]
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield a push's weights to the worker, bucket by bucket, each while the next one comes in.

    Raises TransferError when a sender is gone or silent.
    """
    last_of = {bucket["sender"]: number for number, bucket in enumerate(buckets)}
    for number, bucket in enumerate(buckets):
        link = links[bucket["sender"]]
        if number == 0:
            link.begin(bucket)
        weights = unpack(link.finish(last=last_of[bucket["sender"]] == number), bucket)
        for following in buckets[number + 1 : number + 2]:
            links[following["sender"]].begin(following)
        yield weights


class WeightSender:
    """The sending end of one broadcast group. It hosts the group's store on a free port of `host`.

    host: an address of this machine that the workers can reach; the store listens there alone.
    is_here: the workers are this user's on this machine, and the store is a file that nobody else
    can read.
    device: the group's; NCCL serves "cuda", gloo "cpu", whatever the weights are on.
    timeout_s: for connecting, and for each broadcast.
    """

    def __init__(
        self,
        sender: int,
        host: str,
        num_workers: int,
        device: torch.device,
        timeout_s: float,
        *,
        is_here: bool = False,
    ) -> None:
        self.sender = sender
        self.host = host
        self.num_workers = num_workers
        self.device = device
        self.timeout_s = timeout_s
        self.bytes_sent = 0
        timeout = timedelta(seconds=timeout_s)
        self._folder: tempfile.TemporaryDirectory | None = None
        self._store: dist.Store | None
        if is_here:
            self._folder = private_folder()
            self._store = file_store(f"{self._folder.name}/store", timeout)
            self._found_at: dict[str, Any] = {"file": f"{self._folder.name}/store"}
        else:
            store = listening_store(host, 0, wait_for_workers=False, timeout=timeout)
            self._store, self._found_at = store, {"port": store.port}
        self._group: Group | None = None
        self._in_flight: deque[tuple[Any, Tensor, Bucket]] = deque()
        self._free: Tensor | None = None
        """Memory of a bucket that has gone, for the next one: new memory costs the CPU more"""

    @property
    def address(self) -> dict[str, Any]:
        return {"host": self.host, "device": self.device.type} | self._found_at

    def connect(self) -> None:
        """Block until the workers have joined the group."""
        assert self._store is not None, "closed"
        try:
            self._group = _create_group(
                self._store, self.host, 0, 1 + self.num_workers, self.device, self.timeout_s
            )
        except RuntimeError as error:
            raise TransferError(f"sender {self.sender}: workers did not join: {error}") from error

    def send(self, bucket: Bucket, tensors: Iterable[Tensor]) -> None:
        """Broadcast a bucket; it is filled while the one before it is on the wire."""
        assert self._group is not None, "connect() comes first"
        self._settle(leave=1)
        size = num_elements(bucket) * dtype_of(bucket).itemsize
        memory, self._free = self._free, None
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        flat = memory[:size].view(dtype_of(bucket))
        with torch.no_grad():
            fill(flat, tensors)
        try:
            self._in_flight.append((self._group.broadcast(flat, 0), memory, bucket))
        except RuntimeError as error:
            raise self._failure(bucket, error) from error
        self.bytes_sent += size

    def flush(self) -> None:
        """Wait until every broadcast is done, and give its memory up."""
        self._settle(leave=0)
        self._free = None

    def _settle(self, *, leave: int) -> None:
        while len(self._in_flight) > leave:
            work, memory, bucket = self._in_flight.popleft()
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failure(bucket, error) from error
            self._free = memory

    def _failure(self, bucket: Bucket, error: RuntimeError) -> TransferError:
        return TransferError(f"sender {self.sender}, bucket {names_of(bucket)}: {error}")

    def close(self) -> None:
        """Leave the group and give its store up: a worker that waits fails at once."""
        self._in_flight.clear()
        self._free = self._group = None
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()


class BroadcastLink:
    """A worker's end of a `WeightSender`'s broadcasts. rank: the worker's, counted from 1."""

    def __init__(
        self,
        sender: dict[str, Any],
        rank: int,
        num_workers: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.device = device if sender["device"] == "cuda" else torch.device("cpu")
        host, timeout = sender["host"], timedelta(seconds=timeout_s)
        store: dist.Store
        if "file" in sender:
            store = file_store(sender["file"], timeout)
        else:
            store = dist.TCPStore(
                host, sender["port"], is_master=False, wait_for_workers=False, timeout=timeout
            )
        self._group = _create_group(store, host, rank, 1 + num_workers, self.device, timeout_s)
        self._coming: deque[tuple[Any, Tensor, Bucket]] = deque()

    def begin(self, bucket: Bucket) -> None:
        """Begin to receive the bucket, into memory of its own."""
        flat = torch.empty(num_elements(bucket), dtype=dtype_of(bucket), device=self.device)
        try:
            self._coming.append((self._group.broadcast(flat, 0), flat, bucket))
        except RuntimeError as error:
            raise _nothing_from(bucket, error) from error

    def finish(self, *, last: bool) -> Tensor:
        """Wait for the bucket that was begun first, and return it flat."""
        work, flat, bucket = self._coming.popleft()
        try:
            work.wait()
        except RuntimeError as error:
            raise _nothing_from(bucket, error) from error
        return flat


def _nothing_from(bucket: Bucket, error: Exception) -> TransferError:
    sender, names = bucket["sender"], names_of(bucket)
    return TransferError(f"nothing received from sender {sender}, bucket {names}: {error}")


def send_buckets(
    sender: Sender, plan: Sequence[Bucket], weights: Iterator[tuple[str, Tensor]]
) -> None:
    """Send those buckets of the plan that are this sender's; `weights` come in their order.

    After a failure the sender is closed and has to be replaced.
    """
    try:
        for bucket in plan:
            if bucket["sender"] == sender.sender:
                sender.send(bucket, _take(weights, bucket["names"]))
        sender.flush()
    except BaseException:
        sender.close()  # the other side ends now, not at the timeout
        raise


def _take(weights: Iterator[tuple[str, Tensor]], names: Iterable[str]) -> Iterator[Tensor]:
    for name in names:
        exported, tensor = next(weights)
        assert exported == name, f"the export gave {exported} where its manifest says {name}"
        yield tensor


def _create_group(
    store: dist.Store,
    host: str,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
) -> Group:
    """Make a group of this device's backend; the default group is neither needed nor touched."""
    store = dist.PrefixStore("megafork", store)
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, world_size, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_local_address(host))]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _local_address(host: str) -> str:
    """Return this machine's address towards `host`; its host name may resolve to another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return probe.getsockname()[0]

"""Broadcasts weights from the trainer to the workers of an inference server, in flat buckets.

A sender is the leader rank of one pipeline stage. Each has a group of its own, {the sender as rank
0, the server's workers as ranks 1..num_workers}, built beside torch.distributed's default group.
A bucket is one broadcast of the concatenated tensors of one dtype; the plan of all buckets travels
over HTTP, so that the workers know what comes from whom, and in which order.

The server's processes import this module too: torch alone, no megatron, no vLLM.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megafork.rollout.client import RolloutClient
    from megafork.rollout.fleet import Fleet


Group = Any  # a ProcessGroupGloo or ProcessGroupNCCL: backends are no dist.ProcessGroup


class TransferError(RuntimeError):
    """A broadcast failed or ran into its timeout: the other side is gone or gave up."""


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def plan_buckets(
    sender: int, manifest: list[tuple[str, tuple[int, ...], torch.dtype]], max_bytes: int
) -> list[dict[str, Any]]:
    """Cut a list of (name, shape, dtype), in its order, into buckets of at most `max_bytes`.

    A bucket has one dtype; a tensor larger than `max_bytes` is a bucket alone. Each bucket is
    {"sender", "dtype", "names", "shapes"}, ready for JSON.
    """
    buckets: list[dict[str, Any]] = []
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


class WeightSender:
    """The sending end of one transfer group. It hosts the group's store on a free port of `host`.

    host: an address of this machine that the workers can reach; the store listens there alone.
    timeout_s: for connecting, and for each broadcast.
    """

    def __init__(
        self, sender: int, host: str, num_workers: int, device: torch.device, timeout_s: float
    ) -> None:
        self.sender = sender
        self.host = host
        self.num_workers = num_workers
        self.device = device
        self.timeout_s = timeout_s
        listener = socket.create_server((host, 0))
        self.port = listener.getsockname()[1]
        self._store: dist.TCPStore | None = dist.TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        self._group: Group | None = None

    @property
    def address(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port}

    def connect(self) -> None:
        """Block until the workers have joined (they do in `client.init_transfer`)."""
        assert self._store is not None, "closed"
        try:
            self._group = _create_group(
                self._store,
                self.host,
                self.port,
                0,
                1 + self.num_workers,
                self.device,
                self.timeout_s,
            )
        except RuntimeError as error:
            raise TransferError(f"sender {self.sender}: workers did not join: {error}") from error

    def send(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Broadcast one bucket: (name, tensor) in the order of the plan, tensors of one dtype."""
        assert self._group is not None, "connect() comes first"
        with torch.no_grad():
            flat = torch.cat([tensor.detach().reshape(-1) for _, tensor in bucket])
        try:
            self._group.broadcast(flat.to(self.device), 0).wait()
        except RuntimeError as error:
            names = f"{bucket[0][0]} ... {bucket[-1][0]}"
            raise TransferError(f"sender {self.sender}, bucket {names}: {error}") from error

    def close(self) -> None:
        """Leave the group: a worker that waits for this sender fails at once."""
        self._group = None
        self._store = None


def receive_bucket(
    group: Group, bucket: dict[str, Any], device: torch.device
) -> list[tuple[str, Tensor]]:
    """The worker's side of `WeightSender.send`: (name, view into the flat bucket)."""
    sizes = [math.prod(shape) for shape in bucket["shapes"]]
    flat = torch.empty(sum(sizes), dtype=getattr(torch, bucket["dtype"]), device=device)
    try:
        group.broadcast(flat, 0).wait()
    except RuntimeError as error:
        names = f"{bucket['names'][0]} ... {bucket['names'][-1]}"
        raise TransferError(
            f"nothing received from sender {bucket['sender']}, bucket {names}: {error}"
        ) from error
    views = flat.split(sizes)
    shaped = (view.view(shape) for view, shape in zip(views, bucket["shapes"], strict=True))
    return list(zip(bucket["names"], shaped, strict=True))


def join_group(
    host: str, port: int, rank: int, world_size: int, device: torch.device, timeout_s: float
) -> Group:
    """A worker joins the group of the sender whose store is at host:port."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return _create_group(store, host, port, rank, world_size, device, timeout_s)


def push_buckets(
    client: RolloutClient | Fleet,
    sender: WeightSender,
    plan: list[dict[str, Any]],
    buckets: Iterable[list[tuple[str, Tensor]]],
) -> None:
    """Have the server receive the whole `plan` while this sender broadcasts its own `buckets`.

    For the rank that talks to the server; the other senders just `send` theirs. When it fails the
    server's reason is raised if the connection broke because of it, and the senders have to be
    replaced: close all, create and connect new ones, push again.
    """
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.update_weights, plan)
        try:
            for bucket in buckets:
                sender.send(bucket)
        except TransferError:
            sender.close()
            request.result()  # the server knows why it hung up
            raise
        except BaseException:
            sender.close()  # the request ends now, not at the timeout
            raise
        request.result()


def _create_group(
    store: dist.Store,
    host: str,
    port: int,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
) -> Group:
    """A group of this device's backend. The default group is neither needed nor touched."""
    store = dist.PrefixStore("megafork", store)
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, world_size, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_local_address(host, port))]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _local_address(host: str, port: int) -> str:
    """This machine's address on the way to `host`: the host name may resolve to another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return probe.getsockname()[0]

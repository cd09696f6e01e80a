"""Pushes the policy's weights to the rollout server: every pipeline stage sends its own.

Weights leave under their HF names, in bounded buckets, from the stage's sender to the server's
workers; no file is written and no rank sees another stage's weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from megafork.config import SyncConfig
from megafork.errors import UserError
from megafork.model.scorer import Scorer
from megafork.parallel.addresses import LOOPBACK, address_towards, on_several_nodes, own_address
from megafork.parallel.topology import Topology
from megafork.rollout.client import RolloutClient
from megafork.rollout.fleet import Fleet
from megafork.weight_sync.local import LocalSender
from megafork.weight_sync.transports import (
    Sender,
    TransferError,
    WeightSender,
    plan_buckets,
    push_buckets,
    send_buckets,
)


class WeightSync:
    """Collective: every rank makes one and calls `push` together. `client` is rank 0's."""

    def __init__(
        self,
        policy: Scorer,
        topology: Topology,
        client: RolloutClient | Fleet | None,
        sync: SyncConfig,
        *,
        num_workers: int,
        server_host: str | None = None,
        in_flight: bool = True,
        colocated: bool = False,
    ) -> None:
        """num_workers: of one server.
        server_host: where servers run that are not ours, to find the address by which their
        workers reach us.
        in_flight: responses that are being generated go on with the new weights; False: a push
        waits for them. colocated: the servers, which may share our GPUs, sleep around a push.

        Raises UserError where sync.transport=local has no way to the servers.
        """
        self.in_flight, self.colocated = in_flight, colocated
        self.local = is_local(sync, colocated)
        self.policy, self.topology = policy, topology
        self.timeout_s, self.workers_of_each = sync.timeout_s, num_workers
        self.server_host = server_host
        self.version = 0
        """What the servers have: the last push that succeeded"""
        self.members: list[tuple[str, int]] = []
        """Servers of the transfer groups"""
        manifest = [(name, shape, policy.dtype) for name, shape in policy.shard_manifest()]
        self.own_buckets = plan_buckets(topology.pp_rank, manifest, sync.bucket_mib << 20)
        self.sender: Sender | None = None
        self.connect(client)

    def connect(self, client: RolloutClient | Fleet | None) -> None:
        """Build the transfer groups, anew where there are some: to these servers.

        Raises UserError, on every rank, when the servers' workers do not join.
        """
        self.client, self.version = client, 0
        self._build(self._wanted_members())

    def _wanted_members(self) -> list[tuple[str, int]]:
        def ask() -> list[tuple[str, int]]:
            assert self.client is not None
            return self.client.members()

        return self.topology.on_rank_zero(ask)

    def _build(self, members: list[tuple[str, int]]) -> None:
        """One group for each sender, with the workers of all members."""
        self.close()
        self.num_workers = self.workers_of_each * len(members)
        offer = None
        if self.topology.is_sender:
            self.sender = self._make_sender()
            offer = (self.sender.address, self.own_buckets)
        # Global ranks grow with the stage, so this is the order of the stages.
        offers = [o for o in self.topology.all_gather_object(offer) if o is not None]
        self.addresses = [address for address, _ in offers]
        self.buckets = [bucket for _, buckets in offers for bucket in buckets]
        self._together(self._join)
        self.members = members

    def push(self, version: int) -> None:
        """Give the server the policy's weights as `version`; nothing cached survives.

        A response that goes on is sampled as if all its tokens so far had been the prompt: their
        keys and values are computed again. Raises UserError, on every rank, when the server did not
        take the weights.
        """
        members = self._wanted_members()
        if members != self.members:
            self._build(members)
        self.members = []  # after a failure the groups have to be built again
        # Phase by phase: a rank enters the gathers only when rank 0 is known to come too.
        self._together(self._pause)
        self._together(self._send)
        self._together(lambda: self._finish(version))
        self.version, self.members = version, members

    def forget(self) -> None:
        """The servers have given their weights up, or some missed them."""
        self.version = 0

    def close(self) -> None:
        self.members = []
        if self.sender is not None:
            self.sender.close()
            self.sender = None

    def _make_sender(self) -> Sender:
        stage, device = self.topology.pp_rank, self.topology.device
        if self.local:
            return LocalSender(stage, self.own_buckets, self.num_workers, device, self.timeout_s)
        # NCCL does not connect two ranks on one GPU; gloo goes through the host's memory.
        wire = torch.device("cpu") if self.colocated else device
        address = _own_address(self.server_host or LOOPBACK)
        is_here = self.server_host is None and not on_several_nodes()
        return WeightSender(stage, address, self.num_workers, wire, self.timeout_s, is_here=is_here)

    def _join(self) -> None:
        if self.sender is None:
            return
        if self.client is None:
            self.sender.connect()
            return
        # A daemon: when the server refuses, nobody waits for workers that never join.
        failures: list[TransferError] = []
        connecting = threading.Thread(target=_connect, args=(self.sender, failures), daemon=True)
        connecting.start()
        self.client.init_transfer(self.addresses, self.num_workers, self.timeout_s)
        connecting.join()
        if failures:
            raise failures[0]

    def _pause(self) -> None:
        if self.client is not None:
            if not self.colocated:
                self.client.pause("keep" if self.in_flight else "wait")
            self.client.start_weight_update()

    def _finish(self, version: int) -> None:
        if self.client is None:
            return
        self.client.finish_weight_update(version)
        if not self.colocated:  # what sleeps has no cache, and wakes up by another word
            self.client.reset_prefix_cache(running=True)
        reached = self.client.weight_version()
        if reached != version:
            raise UserError(
                f"the rollout server says weight version {reached} after a push of {version}: "
                "does another trainer use the same server?"
            )
        if not self.colocated:
            self.client.resume()

    def _send(self) -> None:
        """All tp ranks of a stage run the export together; only its sender is given tensors."""
        if not self.topology.is_first_replica:
            return
        shards = self.policy.export_shards()
        try:
            if self.sender is not None and self.client is not None:
                push_buckets(self.client, self.sender, self.buckets, shards)
            elif self.sender is not None:
                send_buckets(self.sender, self.own_buckets, shards)
        finally:
            for _ in shards:  # after a failure too, or the other tp ranks wait for ever
                pass

    def _together(self, work: Callable[[], None]) -> None:
        """Do `work` on every rank; rank 0's failure, told once, ends them all."""
        failure: Exception | None = None
        try:
            work()
        except (TransferError, UserError) as error:
            failure = error

        def report() -> None:
            if failure is not None:
                raise UserError(
                    f"the weight transfer to the rollout server failed: {failure}"
                ) from failure

        self.topology.on_rank_zero(report)


def _connect(sender: Sender, failures: list[TransferError]) -> None:
    try:
        sender.connect()
    except TransferError as error:
        failures.append(error)


def is_local(sync: SyncConfig, colocated: bool) -> bool:
    """Whether weights go through local memory. Raises UserError where that has no way."""
    if sync.transport == "auto":
        return colocated and not on_several_nodes()
    if sync.transport == "local" and on_several_nodes():
        raise UserError(
            "sync.transport=local reaches servers on this machine alone, but the trainer's ranks "
            "are on several: use auto or broadcast"
        )
    return sync.transport == "local"


def _own_address(server_host: str) -> str:
    """This rank's address as the server's workers see it."""
    return own_address() if on_several_nodes() else address_towards(server_host)

"""Pushes the policy's weights to the rollout server: every pipeline stage sends its own.

Weights leave under their HF names, in bounded buckets, through a group of the stage's sender and
the server's workers; no file is written and no rank sees another stage's weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from torch import Tensor

from megafork.config import SyncConfig
from megafork.errors import UserError
from megafork.model.scorer import Scorer
from megafork.parallel.addresses import address_towards, on_several_nodes, own_address
from megafork.parallel.topology import Topology
from megafork.rollout.client import RolloutClient
from megafork.rollout.fleet import Fleet
from megafork.weight_sync.transports import (
    TransferError,
    WeightSender,
    plan_buckets,
    push_buckets,
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
        server_host: str = "127.0.0.1",
        in_flight: bool = True,
    ) -> None:
        """num_workers: of one server.
        server_host: where the servers run, to find the address that their workers reach us by.
        in_flight: responses that are being generated go on with the new weights; False: a push
        waits for them.
        """
        self.in_flight = in_flight
        self.policy, self.topology = policy, topology
        self.timeout_s, self.workers_of_each = sync.timeout_s, num_workers
        self.server_host = server_host
        self.version = 0
        """What the servers have: the last push that succeeded"""
        self.members: list[tuple[str, int]] = []
        """Servers of the transfer groups"""
        manifest = [(name, shape, policy.dtype) for name, shape in policy.shard_manifest()]
        self.own_buckets = plan_buckets(topology.pp_rank, manifest, sync.bucket_mib << 20)
        self.sender: WeightSender | None = None
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
            self.sender = WeightSender(
                self.topology.pp_rank,
                _own_address(self.server_host),
                self.num_workers,
                self.topology.device,
                self.timeout_s,
            )
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

    def close(self) -> None:
        self.members = []
        if self.sender is not None:
            self.sender.close()
            self.sender = None

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
            self.client.pause("keep" if self.in_flight else "wait")
            self.client.start_weight_update()

    def _finish(self, version: int) -> None:
        if self.client is None:
            return
        self.client.finish_weight_update(version)
        self.client.reset_prefix_cache(running=True)
        reached = self.client.weight_version()
        if reached != version:
            raise UserError(
                f"the rollout server says weight version {reached} after a push of {version}: "
                "does another trainer use the same server?"
            )
        self.client.resume()

    def _send(self) -> None:
        """All tp ranks of a stage run the export together; only its sender is given tensors."""
        if not self.topology.is_first_replica:
            return
        shards = self.policy.export_shards()
        try:
            if self.sender is not None:
                tensors = (list(_take(shards, bucket["names"])) for bucket in self.own_buckets)
                if self.client is not None:
                    push_buckets(self.client, self.sender, self.buckets, tensors)
                else:
                    for bucket in tensors:
                        self.sender.send(bucket)
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


def _connect(sender: WeightSender, failures: list[TransferError]) -> None:
    try:
        sender.connect()
    except TransferError as error:
        failures.append(error)


def _take(shards: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        exported, tensor = next(shards)
        assert exported == name, f"the export gave {exported} where its manifest says {name}"
        yield name, tensor


def _own_address(server_host: str) -> str:
    """This rank's address as the server's workers see it."""
    return own_address() if on_several_nodes() else address_towards(server_host)

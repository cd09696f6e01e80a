"""Pushes the policy's weights to the rollout server: every pipeline stage sends its own.

Weights leave under their HF names, in bounded buckets, through a group of the stage's sender and
the server's workers; no file is written and no rank sees another stage's weights.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from megafork.config import SyncConfig
from megafork.errors import UserError
from megafork.parallel.topology import Topology
from megafork.rollout.client import RolloutClient, ServerError
from megafork.training.policy import Scorer
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
        client: RolloutClient | None,
        sync: SyncConfig,
        *,
        num_workers: int,
    ) -> None:
        self.policy, self.topology, self.client = policy, topology, client
        self.timeout_s = sync.timeout_s
        dtype = next(policy.gpt.parameters()).dtype
        manifest = [(name, shape, dtype) for name, shape in policy.shard_manifest()]
        self.own_buckets = plan_buckets(topology.pp_rank, manifest, sync.bucket_mib << 20)
        self.sender: WeightSender | None = None
        offer = None
        if topology.is_sender:
            self.sender = WeightSender(
                topology.pp_rank, _own_address(), num_workers, topology.device, sync.timeout_s
            )
            offer = (self.sender.address, self.own_buckets)
        # Global ranks grow with the stage, so this is the order of the stages.
        offers = [o for o in topology.all_gather_object(offer) if o is not None]
        self.addresses = [address for address, _ in offers]
        self.buckets = [bucket for _, buckets in offers for bucket in buckets]
        self._together(lambda: self._connect(num_workers))

    def push(self, version: int) -> None:
        """Give the server the policy's weights as `version`; nothing cached survives.

        Generation must have ended. Raises UserError, on every rank, when the server did not take
        them.
        """
        self._together(lambda: self._push(version))

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()

    def _connect(self, num_workers: int) -> None:
        if self.sender is None:
            return
        if self.client is None:
            self.sender.connect()
            return
        with ThreadPoolExecutor(1) as pool:
            joined = pool.submit(
                self.client.init_transfer, self.addresses, num_workers, self.timeout_s
            )
            try:
                self.sender.connect()
            finally:
                joined.result()  # the server's reason comes before ours

    def _push(self, version: int) -> None:
        client = self.client
        if client is not None:
            client.pause()
            client.start_weight_update()
        if self.topology.is_first_replica:
            self._send()
        if client is not None:
            client.finish_weight_update(version)
            client.resume()
            reached = client.weight_version()
            if reached != version:
                raise UserError(
                    f"the rollout server says weight version {reached} after a push of {version}: "
                    "does another trainer use the same server?"
                )

    def _send(self) -> None:
        """All tp ranks of a stage run the export together; only its sender is given tensors."""
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
        except (ServerError, TransferError) as error:
            failure = error

        def report() -> None:
            if failure is not None:
                raise UserError(f"the weight transfer to the rollout server failed: {failure}")

        self.topology.on_rank_zero(report)


def _take(shards: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        exported, tensor = next(shards)
        assert exported == name, f"the export gave {exported} where its manifest says {name}"
        yield name, tensor


def _own_address() -> str:
    """Where the server's workers reach this rank: loopback when all ranks share one machine."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return "127.0.0.1"
    return socket.gethostbyname(socket.gethostname())

"""Pushes the policy's weights to the rollout servers: every pipeline stage sends its own.

Weights leave under their HF names, in bounded buckets, from the stage's sender to the servers'
workers; no file is written and no rank sees another stage's weights. The controller talks to the
servers meanwhile (controller/pushes.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from megafork.config import TrainConfig
from megafork.controller.handle import Controller, probed
from megafork.data.sample import Group
from megafork.model.scorer import Scorer
from megafork.parallel.addresses import LOOPBACK, on_several_nodes
from megafork.parallel.mesh import Mesh
from megafork.rollout.engine import host_of
from megafork.rollout.messages import Header
from megafork.trainer.learner import Learner
from megafork.weights import mismatch_check
from megafork.weights.local import LocalSender
from megafork.weights.reach import address_for, is_local
from megafork.weights.transports import (
    Sender,
    TransferError,
    WeightSender,
    plan_buckets,
    send_buckets,
)

_PROBE_BYTES = 1 << 30
"""Of what the servers sampled to be compared, at most"""


class WeightSync:
    """Collective: every rank makes one and calls its methods together. Close it.

    In the colocated placement trainer and servers have the devices in turns: a push puts
    everything of the learners away before the servers wake up, `take_back` brings it back when
    they sleep again.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: Scorer,
        mesh: Mesh,
        controller: Controller,
        learners: Sequence[Learner] = (),
    ) -> None:
        """learners: the policy, and the critic if there is one; of the colocated placement.

        Raises UserError where sync.transport=local has no way to the servers.
        """
        self.config, self.policy, self.mesh = config, policy, mesh
        self.controller, self.learners = controller, learners
        self.colocated = config.rollout.placement == "colocated"
        self.local = is_local(config.sync, self.colocated)
        self.timeout_s = config.sync.timeout_s
        self.server_host = host_of(config.rollout) if config.rollout.urls else None
        self.seconds: dict[str, float] = {}
        """Of the phases sync, offload and onload since they were last taken"""
        self.sender: Sender | None = None
        self._failure: TransferError | None = None
        """Why this rank's sender has no workers"""
        manifest = [(name, shape, policy.dtype) for name, shape in policy.shard_manifest()]
        self.own_buckets = plan_buckets(mesh.pp_rank, manifest, config.sync.bucket_mib << 20)

    def push(self, version: int) -> bool:
        """Give the servers the policy's weights as `version`. Returns False where the run ends.

        Raises UserError or PeerError, as `Controller`, when they do not take them, and where they
        do not compute what the policy does.
        """
        self.mesh.progress.enter(f"sync of step {version - 1}")
        left = False
        while True:
            self._make_room(weights=left)
            answer, _ = self.controller.ask("push_begins", version=version, left=left)
            left = answer["kind"] == "leave"
            if left or answer["kind"] == "again":
                continue
            if answer["kind"] == "join":
                answer = self._join(answer["num_workers"])
            if answer["kind"] == "send":
                answer, groups = self._send()
                if answer["kind"] == "done":
                    self.compare(groups)
                    return True
            if answer["kind"] == "stop":
                self.controller.note_stop(answer)
                return False

    def take_back(self) -> None:
        """Bring the learners back onto the devices, once the servers sleep or are gone."""
        if not self.colocated:
            return
        started = time.monotonic()
        for learner in self.learners:
            learner.onload()
        self._add("onload", started)

    def compare(self, groups: Sequence[Group]) -> None:
        """Refuse to train where the servers sampled by other probabilities than the policy's."""
        if groups:
            found = mismatch_check.measure(list(groups), self.policy, self.mesh)
            mismatch_check.require(found, self.config.sync, self.config.model.dtype)

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None

    def _add(self, phase: str, started: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started

    def _make_room(self, *, weights: bool) -> None:
        """Put all of the learners away but the policy's weights; these too where `weights`."""
        if not self.colocated:
            return
        started = time.monotonic()
        policy, *others = self.learners
        for other in others:
            other.offload()
        policy.offload(weights=weights)
        if not weights:
            policy.onload(optimizer=False)  # where an attempt has put them away
        self._add("offload", started)

    def _join(self, num_workers: int) -> Header:
        """Make new senders, and wait until the servers' workers have joined them."""
        started = time.monotonic()
        self.close()
        offer: dict[str, Any] | None = None
        connecting: threading.Thread | None = None
        failures: list[TransferError] = []
        if self.mesh.is_sender:
            self.sender = self._make_sender(num_workers)
            offer = {"address": self.sender.address, "buckets": self.own_buckets}
            # A daemon: when the servers refuse, nobody waits for workers that never join.
            connecting = threading.Thread(
                target=_connect, args=(self.sender, failures), daemon=True
            )
            connecting.start()
        answer, _ = self.controller.ask("join", offer=offer)
        if answer["kind"] == "send" and connecting is not None:
            connecting.join()
        self._failure = failures[0] if failures else None
        self._add("sync", started)
        return answer

    def _make_sender(self, num_workers: int) -> Sender:
        stage, device = self.mesh.pp_rank, self.mesh.device
        if self.local:
            return LocalSender(stage, self.own_buckets, num_workers, device, self.timeout_s)
        # NCCL does not connect two ranks on one GPU; gloo goes through the host's memory.
        wire = torch.device("cpu") if self.colocated else device
        address = address_for(self.server_host or LOOPBACK)
        is_here = self.server_host is None and not on_several_nodes()
        return WeightSender(stage, address, num_workers, wire, self.timeout_s, is_here=is_here)

    def _send(self) -> tuple[Header, list[Group]]:
        """Send this rank's part; the verdict is one for all, with what is to be compared."""
        started, failure = time.monotonic(), self._failure
        self._failure = None
        if failure is None:
            try:
                self._send_shards()
            except TransferError as error:
                failure = error
        if failure is not None:
            self.close()
        self._add("sync", started)
        if self.colocated:
            self._make_room(weights=True)
        answer, arrays = self.controller.ask(
            "push_ended",
            failure=None if failure is None else str(failure),
            seconds=self.take_seconds(),
            most_bytes=_PROBE_BYTES,
        )
        return answer, probed(answer, arrays)

    def _send_shards(self) -> None:
        """Send this stage's weights. All its tp ranks run the export; only the sender is given
        tensors."""
        if not self.mesh.is_first_replica:
            return
        shards = self.policy.export_shards()
        try:
            if self.sender is not None:
                send_buckets(self.sender, self.own_buckets, shards)
        finally:
            for _ in shards:  # after a failure too, or the other tp ranks wait for ever
                pass


def _connect(sender: Sender, failures: list[TransferError]) -> None:
    try:
        sender.connect()
    except TransferError as error:
        failures.append(error)

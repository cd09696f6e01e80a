"""The rollout workers of a run: one on each replica's first rank, and rank 0 asks all of them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

from megafork.config import TrainConfig
from megafork.data.tokenizer import load_tokenizer
from megafork.parallel.addresses import own_address
from megafork.parallel.topology import Topology
from megafork.rewards.verifier import Judge
from megafork.rollout.background import BackgroundLoop
from megafork.rollout.journal import SUFFIX, Journal, of_replica
from megafork.rollout.remote import RemoteWorker, serve
from megafork.rollout.worker import RolloutWorker, Worker
from megafork.training.step import Skipped

SKIPPED = "skipped"
"""Folder of a run: groups of mini-batches without an update"""


class RunWorkers:
    """Collective. `own` is this replica's, on its first rank; `all` of them, by replica, are rank
    0's to ask. What was started ends with the stack.

    key: what workers and servers ask for. Raises UserError, on every rank, when one cannot start.
    """

    def __init__(
        self, config: TrainConfig, topology: Topology, key: str, stack: contextlib.ExitStack
    ) -> None:
        self.topology, self.skipped_dir = topology, Path(config.run.dir) / SKIPPED
        self.own: RolloutWorker | None = None
        self.all: list[Worker] = []
        host = socket.gethostname() if topology.is_replica_leader else None
        share = topology.all_gather_object(host).count(host)
        found = topology.on_every_rank(lambda: self._start(config, key, share, stack))
        if topology.rank == 0:
            assert self.own is not None
            leaders = sorted(place for place in found if place is not None)
            timeout_s, causes = config.rollout.request_timeout_s, self.own.verdict.causes
            self.all = [self.own]
            for _, rank, url in leaders[1:]:
                self.all.append(RemoteWorker(url, key, rank, timeout_s, causes))

    def _start(
        self, config: TrainConfig, key: str, share: int, stack: contextlib.ExitStack
    ) -> tuple[int, int, str] | None:
        """The replica, its first rank and the worker's URL. share: workers on this machine."""
        topology = self.topology
        if not topology.is_replica_leader:
            return None
        tokenizer = load_tokenizer(
            config,
            chat_template=config.data.chat_template,
            enable_thinking=config.data.enable_thinking,
        )
        verdict = Judge(config.reward, share=share)
        stack.callback(verdict.close)
        self.own = RolloutWorker(
            config.rollout,
            tokenizer,
            verdict,
            Path(config.run.dir) / "rollouts",
            api_key=key,
            replica=topology.dp_rank,
            num_replicas=topology.dp_size,
        )
        stack.callback(self.own.close)
        url = ""
        if topology.rank != 0:  # which asks its own directly
            loop = stack.enter_context(BackgroundLoop())
            url = loop.submit(serve(self.own, own_address(), key)).result()
        return topology.dp_rank, topology.rank, url

    def keep_skipped(self, step: int, skipped: Sequence[Skipped]) -> None:
        """Collective: write the groups of mini-batches without an update, each replica its own."""
        self.topology.on_every_rank(lambda: self._keep_skipped(step, skipped))

    def _keep_skipped(self, step: int, skipped: Sequence[Skipped]) -> None:
        if self.own is None:
            return
        for part in skipped:
            members = set(part.table.group_B.tolist())
            path = self.skipped_dir / f"step_{step:06d}_minibatch_{part.number:03d}{SUFFIX}"
            if groups := [group for group in self.own.batch if group.prompt_index in members]:
                with Journal(of_replica(path, self.own.replica)) as journal:
                    for group in groups:
                        journal.append(group)

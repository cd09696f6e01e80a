"""The rollout servers of a run: each node starts its own, and rank 0 talks to all of them."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from megafork.config import TrainConfig
from megafork.interruption import Interruption
from megafork.parallel.addresses import own_address
from megafork.parallel.topology import Topology
from megafork.rollout.client import RolloutClient
from megafork.rollout.engine import LocalServers, api_key_of, log_paths, served_policy, start_here
from megafork.rollout.fleet import Fleet


class RunServers:
    """Collective. `local` is the first rank's of each node where rollout.url is unset, `fleet`
    rank 0's. What was started ends with the stack.

    Raises UserError, on every rank, when a node cannot start its own.
    """

    def __init__(
        self, config: TrainConfig, topology: Topology, stack: contextlib.ExitStack
    ) -> None:
        self.rollout, self.topology = config.rollout, topology
        self.local: LocalServers | None = None
        self.fleet: Fleet | None = None
        key = topology.broadcast_object(secrets.token_urlsafe(32))
        found = topology.on_every_rank(lambda: self._start(config, key, stack))
        if topology.rank == 0:
            places: list[tuple[str, Path | None]] = [place for places in found for place in places]
            if self.rollout.url is not None:
                places = [(url, None) for url in self.rollout.urls]
                key = api_key_of(self.rollout)
            timeout_s = self.rollout.request_timeout_s
            self.fleet = Fleet(
                [RolloutClient(url, key, timeout_s=timeout_s, log_path=log) for url, log in places],
                max_num_seqs=self.rollout.max_num_seqs,
                max_restarts=self.rollout.max_restarts,
                given_up=self.local.given_up if self.local is not None else dict,
            )
            stack.enter_context(self.fleet)

    def _start(
        self, config: TrainConfig, key: str, stack: contextlib.ExitStack
    ) -> list[tuple[str, Path | None]]:
        """Of each server that this rank starts: its URL and its log."""
        rollout = self.rollout
        if rollout.url is not None or int(os.environ.get("LOCAL_RANK", "0")) != 0:
            return []
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.topology.world_size))
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        first = int(os.environ.get("GROUP_RANK", "0")) * rollout.servers
        logs = log_paths(Path(config.run.dir) / "vllm.log", num_nodes * rollout.servers)
        logs = logs[first : first + rollout.servers]
        self.local = start_here(
            served_policy(config),
            rollout,
            self.topology.device.type,
            logs,
            api_key=key,
            host=own_address(),
            max_restarts=rollout.max_restarts,
            num_trainers=num_here,
            shared=rollout.placement == "colocated",
        )
        stack.enter_context(self.local)
        return list(zip(self.local.urls, logs, strict=True))

    def wait_until_up(self, interruption: Interruption) -> None:
        """Collective. Raises UserError, with the cause, when a server does not come up."""
        local, fleet, rollout = self.local, self.fleet, self.rollout
        self.topology.on_every_rank(
            lambda: local.wait(interruption.check) if local is not None else None
        )

        def wait() -> None:
            assert fleet is not None
            timeout_s, key = rollout.startup_timeout_s, rollout.api_key_env
            fleet.wait_until_up(timeout_s, key, interruption.check)

        self.topology.on_rank_zero(wait)

    def restart(self, urls: list[str]) -> None:
        """Those of this node that run and do not answer."""
        if self.local is not None:
            self.local.restart(urls)

    def forgive(self) -> None:
        """After a push: see LocalServers."""
        if self.local is not None:
            self.local.forgive()

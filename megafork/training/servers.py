"""The rollout servers of a run: each node starts its own, and rank 0 talks to all of them."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from megafork.config import TrainConfig
from megafork.interruption import Interruption
from megafork.parallel.addresses import own_address
from megafork.parallel.topology import Topology
from megafork.rollout.client import RolloutClient
from megafork.rollout.engine import LocalServers, api_key_of, served_policy, start_here
from megafork.rollout.fleet import Fleet
from megafork.rollout.vllm_server import log_paths
from megafork.weight_sync.push import is_local


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
        self.key = key = topology.on_rank_zero(self._find_key)
        """What the servers ask for"""
        found = topology.on_every_rank(lambda: self._start(config, key, stack))
        if topology.rank == 0:
            places: list[tuple[str, Path | None]] = [place for places in found for place in places]
            if self.rollout.url is not None:
                places = [(url, None) for url in self.rollout.urls]
            timeout_s = self.rollout.request_timeout_s
            self.fleet = Fleet(
                [RolloutClient(url, key, timeout_s=timeout_s, log_path=log) for url, log in places],
                max_num_seqs=self.rollout.max_num_seqs,
                max_restarts=self.rollout.max_restarts,
                given_up=self.local.given_up if self.local is not None else dict,
                in_turns=self.rollout.placement == "colocated",
            )
            stack.enter_context(self.fleet)

    def _find_key(self) -> str:
        if self.rollout.url is not None:
            return api_key_of(self.rollout)
        return secrets.token_urlsafe(32)

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
        colocated = rollout.placement == "colocated"
        self.local = start_here(
            served_policy(config),
            rollout,
            self.topology.device.type,
            logs,
            api_key=key,
            host=own_address(),
            max_restarts=rollout.max_restarts,
            num_trainers=num_here,
            shared=colocated,
            sees_trainers=is_local(config.sync, colocated),
        )
        stack.enter_context(self.local)
        return list(zip(self.local.urls, logs, strict=True))

    def wait_until_up(self, interruption: Interruption) -> None:
        """Collective. Raises UserError, with the cause, when a server does not come up."""
        fleet, rollout = self.fleet, self.rollout
        self._on_each_node(lambda local: local.wait(interruption.check))

        def wait() -> None:
            assert fleet is not None
            timeout_s, key = rollout.startup_timeout_s, rollout.api_key_env
            fleet.wait_until_up(timeout_s, key, interruption.check)

        self.topology.on_rank_zero(wait)

    def put_to_sleep(self, interruption: Interruption) -> None:
        """Collective; those that do not go to sleep are ended, so that their devices are free.

        Raises Interrupted when a signal came that may have ended one.
        """

        def put() -> list[str]:
            assert self.fleet is not None
            awake = self.fleet.sleep()
            if awake:
                interruption.check()
            return awake

        awake = self.topology.on_rank_zero(put)
        if awake:
            self._on_each_node(lambda local: local.end(awake))

    def start_again(self, urls: list[str], interruption: Interruption) -> None:
        """Collective, of servers in turns: end these; returns when new ones answer or are given up.

        They are awake then, and wait for the next push.
        """
        self._on_each_node(lambda local: local.start_again(urls, interruption.check))

        def look() -> None:
            assert self.fleet is not None
            self.fleet.look_again()

        self.topology.on_rank_zero(look)

    def stop(self) -> None:
        """Collective: end all that were started, for good."""
        self._on_each_node(lambda local: local.stop())

    def _on_each_node(self, work: Callable[[LocalServers], None]) -> None:
        local = self.local
        self.topology.on_every_rank(lambda: work(local) if local is not None else None)

    def restart(self, urls: list[str]) -> None:
        """Those of this node that run and do not answer."""
        if self.local is not None:
            self.local.restart(urls)

    def forgive(self) -> None:
        """After a push: see LocalServers."""
        if self.local is not None:
            self.local.forgive()

"""One run: what it is made of, in the order in which it is built and ended."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from megafork.checkpoint.store import CheckpointStore
from megafork.config import TrainConfig
from megafork.config.file import settings_of
from megafork.errors import UserError
from megafork.interruption import Interruption
from megafork.parallel.topology import Topology, initialize, shutdown
from megafork.rollout.agent import Agent
from megafork.rollout.engine import host_of
from megafork.rollout.messages import Connection
from megafork.training.critic import Critic
from megafork.training.front import Front
from megafork.training.policy import Policy
from megafork.training.run_dir import open_run_dir
from megafork.training.servers import RunServers
from megafork.training.trainer import Trainer
from megafork.weight_sync.push import WeightSync


def train(config: TrainConfig, *, resume: bool = False) -> None:
    """`megafork train` on this rank, from joining the world to the final checkpoint.

    resume: go on after the newest whole checkpoint in run.dir, or from the start where there is
    none; groups that the journal holds are not generated again. Raises Interrupted when a signal
    ended it early.
    """
    with Interruption() as interruption:
        topology = initialize(config.parallel, seed=config.training.seed)
        _train(config, topology, interruption, resume)
    shutdown()


def _train(
    config: TrainConfig, topology: Topology, interruption: Interruption, resume: bool
) -> None:
    topology.require_equal("settings", dict(settings_of(config)))
    run_dir = Path(config.run.dir)
    store = CheckpointStore(
        run_dir / "checkpoints",
        topology,
        config.checkpoint,
        model=Path(config.model.path),
        tokenizer=config.tokenizer.path,
    )
    with contextlib.ExitStack() as stack:
        topology.on_rank_zero(lambda: stack.enter_context(open_run_dir(config, resume=resume)))
        servers = RunServers(config, topology, stack)  # they load while the policy does
        stack.enter_context(topology.whereabouts.told())  # at once: a server's end takes time
        colocated = config.rollout.placement == "colocated"
        if colocated:  # the devices are the servers' until they are up, then ours
            topology.whereabouts.enter("the start of the rollout servers")
            servers.wait_until_up(interruption)
            servers.put_to_sleep(interruption)
        topology.whereabouts.enter("the loading of the model")
        policy = Policy(config, topology)
        critic = Critic(config, topology) if config.algorithm.advantages == "gae" else None
        state = _load_newest(store, policy, critic) if resume else None
        front: Front | None = None

        def open_front() -> tuple[str, int]:
            nonlocal front
            assert servers.fleet is not None
            done, shape = state["step"] if state is not None else 0, policy.shape
            front = Front(config, servers.fleet, servers.key, interruption, shape, steps_done=done)
            stack.callback(front.close)
            return front.address

        address = topology.on_rank_zero(open_front)
        rows = _connect(config, topology, address, servers.key, stack)
        if not colocated:
            topology.whereabouts.enter("the start of the rollout servers")
            servers.wait_until_up(interruption)
        sync = WeightSync(
            policy,
            topology,
            servers.fleet,
            config.sync,
            num_workers=config.rollout.tensor_parallel,
            server_host=host_of(config.rollout) if config.rollout.urls else None,
            in_flight=config.rollout.in_flight_update,
            colocated=colocated,
        )
        stack.callback(sync.close)
        trainer = Trainer(
            config, topology, policy, sync, front, store, interruption, servers, rows, critic
        )
        if state is not None:
            trainer.restore(state)
        trainer.run()


def _connect(
    config: TrainConfig,
    topology: Topology,
    address: tuple[str, int],
    key: str,
    stack: contextlib.ExitStack,
) -> Connection | None:
    """Collective: each replica's first rank gets a connection to rank 0; nodes get their agents."""
    rows: Connection | None = None

    def connect() -> None:
        nonlocal rows
        try:
            if topology.is_replica_leader:
                rows = stack.enter_context(Connection(address, key, {"role": "rank"}))
            if topology.rank != 0 and int(os.environ.get("LOCAL_RANK", "0")) == 0:
                stack.enter_context(Agent(config.reward, address, key))
        except OSError as error:
            raise UserError(
                f"rank 0 is not to be reached at {address[0]}:{address[1]} ({error}): every "
                "node of the run needs a way to the ports that rank 0 opens"
            ) from error

    topology.on_every_rank(connect)
    return rows


def _load_newest(
    store: CheckpointStore, policy: Policy, critic: Critic | None
) -> dict[str, Any] | None:
    path = store.newest()
    if path is None:
        return None
    if policy.topology.rank == 0:
        print(f"resuming from {path}", flush=True)
    return store.load(path, policy.stages, policy.optimizer, critic)

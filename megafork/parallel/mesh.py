"""The one place that builds process groups. Everything else is handed the groups it needs."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megafork.config import ParallelConfig
from megafork.errors import PeerError, UserError
from megafork.parallel import backend
from megafork.parallel.addresses import LOOPBACK, loopback_interface, on_several_nodes
from megafork.parallel.progress import Progress
from megafork.parallel.unpickling import guard_collectives
from megafork.system.rendezvous import STORE, file_store, listening_store

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout and the groups it talks to."""

    device: torch.device
    groups: ProcessGroupCollection
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    last_stage_rank: int
    """Global rank of the last pipeline stage's first rank: where the losses and metrics are."""
    progress: Progress

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_replica_leader(self) -> bool:
        """The first of the tp * pp * cp ranks that hold one copy of the model; rank 0 is one."""
        return self.tp_rank == self.pp_rank == self.cp_rank == 0

    @property
    def is_first_replica(self) -> bool:
        """True on the one replica of the same weights that sends and writes them."""
        return dist.get_rank(self.groups.dp_cp) == 0

    @property
    def is_sender(self) -> bool:
        """True on the one rank of each pipeline stage that sends the stage's weights."""
        return self.tp_rank == 0 and self.is_first_replica

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Return `value` of global rank `src`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=src)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return `value` of every rank, in rank order."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0; its value reaches every rank.

        Its exception is raised on rank 0 and ends the others silently, as a PeerError.
        """
        value: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = function()
            except Exception as caught:  # told to the others first, then raised
                error = caught
        value, has_failed = self.broadcast_object((value, error is not None))
        if error is not None:
            raise error
        if has_failed:
            raise PeerError("rank 0 failed")
        return value  # type: ignore[return-value]

    def on_every_rank(self, function: Callable[[], T]) -> list[T]:
        """Run `function` on every rank; all values, in rank order, reach every rank.

        Where it fails, rank 0 raises a UserError that names the first rank and its cause, and the
        others a PeerError.
        """
        value: T | None = None
        failure: str | None = None
        try:
            value = function()
        except UserError as error:
            failure = str(error)
        outcomes = self.all_gather_object((value, failure))
        for rank, (_, failure) in enumerate(outcomes):
            if failure is None:
                continue
            if self.rank != 0:
                raise PeerError(failure)
            raise UserError(failure if rank == 0 else f"rank {rank}: {failure}")
        return [value for value, _ in outcomes]

    def require_equal(self, what: str, values: Mapping[str, Any]) -> None:
        """Raise UserError, on every rank, where one has another value than rank 0. Collective.

        For what each rank finds in its own files and environment and what decides how often, or
        with which shapes, ranks call each other: where it differs, they would wait for ever. what:
        where the values are from, in the plural.
        """
        everyone = self.all_gather_object({name: repr(value) for name, value in values.items()})
        ours = everyone[0]
        for rank, theirs in enumerate(everyone):
            for name in sorted(ours.keys() | theirs.keys()):
                own, other = (found.get(name, "not there") for found in (ours, theirs))
                if own != other:
                    raise UserError(
                        f"{what} differ between ranks: {name} is {other} on rank {rank} and {own} "
                        "on rank 0. It has to be the same on all: compare the nodes' configs, "
                        "models, packages and environments"
                    )

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank. Collective."""
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)


def find_world(startup_s: float, timeout: datetime.timedelta) -> dict[str, Any]:
    """Wait until every rank has come to the world's store; the arguments that join it.

    Apart from `timeout`, which has to allow for a generation, so that a machine that is not there
    is found out soon. Raises UserError that names the absent ranks, or the address.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = os.environ.get(STORE) or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = datetime.timedelta(seconds=startup_s)
    try:
        world = _open_store(rank, world_size, limit)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {rank} cannot reach the rendezvous at {where} (parallel.startup_timeout_s="
            f"{startup_s:g}): is it the first machine's address as seen from here? {error}"
        ) from None
    store = dist.PrefixStore("megafork/here", world)
    store.set(str(rank), socket.gethostname())
    try:
        store.wait([str(other) for other in range(world_size)], limit)
    except RuntimeError:
        absent = [str(other) for other in range(world_size) if not store.check([str(other)])]
        raise UserError(
            f"rank {', '.join(absent)} did not come to {where} within "
            f"parallel.startup_timeout_s={startup_s:g}: see what holds it up, or allow more"
        ) from None
    world.set_timeout(timeout)
    return {"store": world, "rank": rank, "world_size": world_size}


def _open_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The launcher's file; under torchrun its store, or one that rank 0 serves."""
    if path := os.environ.get(STORE):
        return file_store(path)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Not waiting for the others: it would not say who is missing.
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.TCPStore(
            host, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False
        )
    if not on_several_nodes():
        return listening_store(LOOPBACK, port, timeout=timeout, wait_for_workers=False)
    return dist.TCPStore(
        host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False
    )


def initialize(parallel: ParallelConfig, *, seed: int = 0, gloo_groups: bool = True) -> Mesh:
    """Join the world that torchrun (or a plain start) made and split it as `parallel` says.

    gloo_groups: also for objects and tensors of the CPU, beside NCCL's.
    Raises UserError when the world's size and the layout disagree.
    """
    device = backend.prepare()
    guard_collectives()
    if not on_several_nodes():
        os.environ["GLOO_SOCKET_IFNAME"] = loopback_interface()
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
        kwargs: dict[str, Any] = {"backend": backend.communication_backend(), "timeout": timeout}
        if "RANK" not in os.environ:
            kwargs |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        else:
            kwargs |= find_world(parallel.startup_timeout_s, timeout)
        dist.init_process_group(**kwargs)
    world_size = dist.get_world_size()
    dp_size, rest = divmod(world_size, parallel.model_parallel_size)
    if rest or dp_size == 0 or parallel.dp not in (None, dp_size):
        want = f"parallel.dp={parallel.dp} * " if parallel.dp else ""
        raise UserError(
            f"{want}parallel.tp={parallel.tp} * pp={parallel.pp} * cp={parallel.cp} does not fit "
            f"the world of {world_size} ranks: start {parallel.world_size} ranks or change them"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=parallel.timeout_minutes,
        create_gloo_process_groups=gloo_groups,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tp_rank, pp_rank = dist.get_rank(groups.tp), dist.get_rank(groups.pp)
    model_parallel_cuda_manual_seed(seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
    return Mesh(
        device=device,
        groups=groups,
        rank=dist.get_rank(),
        world_size=world_size,
        tp_rank=tp_rank,
        tp_size=parallel.tp,
        pp_rank=pp_rank,
        pp_size=parallel.pp,
        cp_rank=dist.get_rank(groups.cp),
        cp_size=parallel.cp,
        dp_rank=dist.get_rank(groups.dp),
        dp_size=dp_size,
        last_stage_rank=world_size - dp_size * parallel.tp * parallel.cp,
        progress=Progress(dist.get_rank(), world_size, parallel.timeout_minutes),
    )


def shutdown() -> None:
    """Leave the world; a later `initialize` in the same process starts afresh."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

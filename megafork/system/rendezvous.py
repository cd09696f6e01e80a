"""The rendezvous of a run's ranks: each is told its place, and nothing is negotiated.

torchelastic's own ways listen on all interfaces, and its c10d rendezvous unpickles whatever anybody
has put into its store. Here the ranks of one machine share a file in a folder that only their user
can enter, and those of several machines a store that listens at one address. Nothing in either is
pickled.
"""

from __future__ import annotations

import datetime
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

from torch.distributed import FileStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "megafork"
STORE = "MEGAFORK_STORE"
"""Names the file that the ranks of one machine share"""
_NEVER_REMOVED = -1
"""World size of a FileStore that leaves its file to the folder's owner"""


def private_folder() -> tempfile.TemporaryDirectory:
    """Make a temporary folder that only this user can enter.

    A rank's lies inside its launcher's, where that has one: the launcher outlives it and removes
    what is left.
    """
    parent = os.path.dirname(os.environ[STORE]) if STORE in os.environ else None
    return tempfile.TemporaryDirectory(prefix="megafork-", dir=parent)


def file_store(path: str, timeout: datetime.timedelta | None = None) -> FileStore:
    store = FileStore(path, _NEVER_REMOVED)
    if timeout is not None:
        store.set_timeout(timeout)
    return store


def listening_store(host: str, port: int, **options: Any) -> TCPStore:
    """Open the serving end of a TCPStore at `host` alone; torch's own listens everywhere.

    port: 0 takes a free one. Raises OSError when it cannot listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, master_listen_fd=listener.detach(), **options)


class Rendezvous(RendezvousHandler):
    """The rendezvous of torchelastic's agents, one on each of `count` machines.

    open_store: gives the store that the agents and their ranks share. host, port: what the ranks
    are told as MASTER_ADDR and MASTER_PORT. this: this machine's number.
    """

    def __init__(
        self, open_store: Callable[[], Store], host: str, port: int, *, this: int, count: int
    ) -> None:
        self._open_store, self._this, self._count = open_store, this, count
        self._told = RendezvousStoreInfo(host, port)
        self._store: Store | None = None

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = self._store or self._open_store()
        agents = PrefixStore("megafork/agents", self._store)
        return RendezvousInfo(agents, self._this, self._count, self._told)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return BACKEND

    def shutdown(self) -> bool:
        return True


def on_one_machine(path: str) -> Rendezvous:
    """Return one machine's rendezvous.

    path: the file that becomes the store; the launcher tells the ranks of it in $MEGAFORK_STORE.
    """
    return Rendezvous(lambda: file_store(path), "127.0.0.1", 0, this=0, count=1)


def on_several_machines(endpoint: str, *, this: int, count: int, timeout_s: float) -> Rendezvous:
    """Return this machine's part in the rendezvous of several.

    endpoint: host:port of the first machine, whose agent listens there and nowhere else.
    """
    host, _, port = endpoint.rpartition(":")
    timeout = datetime.timedelta(seconds=timeout_s)

    def open_store() -> Store:
        if this == 0:
            return listening_store(host, int(port), world_size=count, timeout=timeout)
        return TCPStore(host, int(port), count, is_master=False, timeout=timeout)

    return Rendezvous(open_store, host, int(port), this=this, count=count)


def _given(parameters: RendezvousParameters) -> RendezvousHandler:
    return parameters.config["rendezvous"]


def launch_options(rendezvous: Rendezvous) -> dict[str, Any]:
    """Register the rendezvous, and return the arguments of LaunchConfig that select it."""
    rendezvous_handler_registry.register(BACKEND, _given)
    # Ranks are numbered by machine: the agents need not ask each other how many each has.
    os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"
    return {
        "rdzv_backend": BACKEND,
        "rdzv_configs": {"rendezvous": rendezvous},
        "run_id": BACKEND,
    }

"""The way by which weights and messages reach the servers. Imports no torch."""

from __future__ import annotations

from megafork.config import SyncConfig
from megafork.errors import UserError
from megafork.parallel.addresses import address_towards, on_several_nodes, own_address


def is_local(sync: SyncConfig, colocated: bool) -> bool:
    """Return whether weights go through local memory. Raises UserError where that cannot be."""
    if sync.transport == "auto":
        return colocated and not on_several_nodes()
    if sync.transport == "local" and on_several_nodes():
        raise UserError(
            "sync.transport=local reaches servers on this machine alone, but the trainer's ranks "
            "are on several: use auto or broadcast"
        )
    return sync.transport == "local"


def address_for(server_host: str) -> str:
    """Return this rank's address as the server's workers see it."""
    return own_address() if on_several_nodes() else address_towards(server_host)

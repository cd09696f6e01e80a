"""This machine's address, as other machines of the same world reach it. Imports no torch."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from megafork.errors import UserError

LOOPBACK = "127.0.0.1"


def on_several_nodes() -> bool:
    """Return whether torchrun started ranks on other machines too."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world_size) != world_size


def address_towards(host: str) -> str:
    """Return the address of the interface that packets to `host` leave by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return probe.getsockname()[0]


def loopback_interface() -> str:
    """Return the loopback interface's name, "lo" on Linux."""
    names = psutil.net_if_addrs().items()
    return next(name for name, found in names if any(a.address == LOOPBACK for a in found))


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def own_address() -> str:
    """Return the address for servers that all nodes of the world reach: 127.0.0.1 on one node.

    Raises UserError where this machine knows itself by a loopback address alone.
    """
    if not on_several_nodes():
        return LOOPBACK
    # The rendezvous is reached by all nodes; its own node may call itself 127.0.1.1.
    found = [address_towards(os.environ.get("MASTER_ADDR", LOOPBACK))]
    if is_loopback(found[0]):
        found.append(socket.gethostbyname(socket.gethostname()))
    if is_loopback(found[-1]):
        raise UserError(
            f"this node's name {socket.gethostname()} stands for {found[-1]}, which other nodes do "
            "not reach: give torchrun --rdzv-endpoint (or MASTER_ADDR) by address, or mend "
            "/etc/hosts"
        )
    return found[-1]

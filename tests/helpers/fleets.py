"""Fleets of small servers (rollout_servers.py), for tests in plain code."""

from __future__ import annotations

import asyncio
import contextlib

from megafork.rollout.fleet import Fleet
from megafork.rollout.sampling import Sampling
from tests.helpers.blocking import BlockingFleet

SAMPLING = Sampling(max_tokens=10)


@contextlib.contextmanager
def fleet_of(servers, timeout_s=10.0, **options):
    fleet = Fleet(
        [server.client(timeout_s) for server in servers], **({"max_num_seqs": 64} | options)
    )
    fleet.notes = []
    fleet.note = fleet.notes.append
    with BlockingFleet(fleet) as blocking:
        yield blocking


def up(fleet):
    fleet.wait_until_up(10.0, "KEY")
    return fleet


def asking(fleet, prompts, n=2):
    """Begin to ask for responses to these prompts. Returns the job."""

    async def ask():
        return await asyncio.gather(
            *(
                fleet.wrapped.generate([p], n, SAMPLING, 100 * p, request_id=f"r{p}")
                for p in prompts
            )
        )

    return fleet.submit(ask())


def ask(fleet, prompts, n=2):
    return asking(fleet, prompts, n).result()

"""Ranks that do not come to a collective are named by the one that waited."""

from __future__ import annotations

import datetime
import re
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megafork.config import ParallelConfig
from megafork.errors import PeerError, UserError
from megafork.parallel import whereabouts
from megafork.parallel.topology import initialize
from tools.benchmarks.ranks import run_ranks

LIMIT = datetime.timedelta(minutes=3)
"""For what does come, however busy the machine is"""
TIMEOUT = datetime.timedelta(seconds=1.2)
"""For what does not"""


def one_rank_stays_away(who, layout):
    """The seconds that it was away, on that rank; None on those that waited for it."""
    topology = initialize(ParallelConfig(**layout, timeout_minutes=LIMIT.total_seconds() / 60))
    [gloo] = {dist.group.WORLD._get_backend(torch.device("cpu"))}
    assert gloo.options._timeout == LIMIT
    assert topology.whereabouts.timeout_minutes == 3
    store = dist.distributed_c10d._get_default_store()
    told = [f"told/{rank}" for rank in range(3) if rank != who]
    topology.any_rank(False)
    topology.whereabouts.enter("update of step 3")
    if topology.rank == who:
        started = time.time()
        topology.whereabouts.enter("eval of step 3")
        store.set("away", "")
        store.wait(told, LIMIT)
        return time.time() - started
    topology.whereabouts.enter("sync of step 3")
    store.wait(["away"], LIMIT)
    # From here on, that the world is made however long it takes.
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)
    topology.whereabouts.timeout_minutes = TIMEOUT.total_seconds() / 60
    with (
        mock.patch.object(time, "sleep", lambda _: wait_for_the_other(topology, who)),
        pytest.raises(PeerError),
        topology.whereabouts.told(),
    ):
        dist.all_reduce(torch.zeros(1))
    store.set(f"told/{topology.rank}", "")
    return None


def wait_for_the_other(topology, who):
    """The grace that a rank gives the others, to the event that it is for."""
    waiting = [f"waits/{rank}" for rank in range(3) if rank != who]
    topology.whereabouts._board.wait(waiting, LIMIT)


@pytest.mark.parametrize(
    ("who", "layout"), [(1, {"tp": 3}), (0, {"pp": 3})], ids=["rank 1 of 3", "rank 0 of 3"]
)
def test_the_absent_rank_is_named_once(capfd, who, layout):
    outcomes = run_ranks(3, one_rank_stays_away, who, layout)
    seconds_away = outcomes.pop(who)
    assert outcomes == [None] * 2
    told = capfd.readouterr().err
    [found] = re.findall(
        r"error \(rank \d\): in sync of step 3 a collective was not done within "
        r"parallel\.timeout_minutes=0\.02\. Rank (\d) did not come; it has been in eval of step 3 "
        r"for (\d+) s\n",
        told,
    )
    assert int(found[0]) == who
    assert 1 <= int(found[1]) <= round(seconds_away)
    assert told.count("error (rank") == 1


def one_rank_ends():
    whereabouts._GRACE_S = 0.1  # nobody tells, however long the others are given
    topology = initialize(ParallelConfig(tp=3))
    topology.any_rank(False)
    if topology.rank == 1:
        dist.destroy_process_group()
        return
    with pytest.raises(PeerError), topology.whereabouts.told():
        dist.all_reduce(torch.zeros(1))


def test_the_end_of_a_rank_is_for_others_to_tell(capfd):
    run_ranks(3, one_rank_ends)
    assert "error (rank" not in capfd.readouterr().err


def another_error():
    topology = initialize(ParallelConfig(tp=2))
    with pytest.raises(RuntimeError, match="shape"), topology.whereabouts.told():
        torch.zeros(2) + torch.zeros(3).view(2)
    with pytest.raises(UserError, match="mine"), topology.whereabouts.told():
        raise UserError("mine")


def test_other_errors_pass_through():
    run_ranks(2, another_error)

"""Ranks that do not come to a collective are named by those that waited."""

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
from megafork.parallel import progress
from megafork.parallel.mesh import initialize
from megafork.system import failure_file
from tools.benchmarks.ranks import run_ranks

LIMIT = datetime.timedelta(minutes=3)
"""For what does come, however busy the machine is"""
TIMEOUT = datetime.timedelta(seconds=1.2)
"""For what does not"""


def one_rank_stays_away(who, layout):
    """What a rank that waited for it says; the seconds that it was away, on that rank."""
    mesh = initialize(ParallelConfig(**layout, timeout_minutes=LIMIT.total_seconds() / 60))
    [gloo] = {dist.group.WORLD._get_backend(torch.device("cpu"))}
    assert gloo.options._timeout == LIMIT
    assert mesh.progress.timeout_minutes == 3
    store = dist.distributed_c10d._get_default_store()
    told = [f"told/{rank}" for rank in range(3) if rank != who]
    mesh.any_rank(False)
    mesh.progress.enter("update of step 3")
    if mesh.rank == who:
        started = time.time()
        mesh.progress.enter("eval of step 3")
        store.set("away", "")
        store.wait(told, LIMIT)
        return time.time() - started
    mesh.progress.enter("sync of step 3")
    store.wait(["away"], LIMIT)
    # From here on, that the world is made however long it takes.
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)
    mesh.progress.timeout_minutes = TIMEOUT.total_seconds() / 60
    with (
        mock.patch.object(time, "sleep", lambda _: wait_for_the_other(mesh, who)),
        pytest.raises(PeerError) as caught,
        mesh.progress.told(),
    ):
        dist.all_reduce(torch.zeros(1))
    store.set(f"told/{mesh.rank}", "")
    return str(caught.value)


def wait_for_the_other(mesh, who):
    """The grace that a rank gives the others, to the event that it is for."""
    waiting = [f"waits/{rank}" for rank in range(3) if rank != who]
    mesh.progress._board.wait(waiting, LIMIT)


@pytest.mark.parametrize(
    ("who", "layout"), [(1, {"tp": 3}), (0, {"pp": 3})], ids=["rank 1 of 3", "rank 0 of 3"]
)
def test_the_absent_rank_is_named(monkeypatch, who, layout):
    monkeypatch.setattr(progress, "_GRACE_S", 2.0)
    outcomes = run_ranks(3, one_rank_stays_away, who, layout)
    seconds_away = outcomes.pop(who)
    for told in outcomes:
        found = re.match(
            r"in sync of step 3 a collective failed \(parallel\.timeout_minutes=0\.02\)\. "
            r"Rank (\d) did not come; it has been in eval of step 3 for (\d+) s\. Look at ",
            told,
        )
        assert int(found[1]) == who
        assert 1 <= int(found[2]) <= round(seconds_away)


def one_rank_ends():
    """Whether the others take what they then raise for a failure of their own."""
    mesh = initialize(ParallelConfig(tp=3))
    mesh.any_rank(False)
    if mesh.rank == 1:
        dist.destroy_process_group()
        return []
    values = torch.zeros(1)
    waits = (
        lambda: dist.all_reduce(values),
        lambda: dist.all_reduce(values, async_op=True).wait(),
        lambda: dist.all_gather_object([None] * 3, 1),
        lambda: dist.batch_isend_irecv([dist.P2POp(dist.irecv, values, 1)])[0].wait(),
    )
    store = dist.distributed_c10d._get_default_store()
    waits += (lambda: store.wait(["what nobody sets"], TIMEOUT),)
    own = []
    for wait in waits:
        with pytest.raises(RuntimeError) as caught:
            wait()
        own.append(not failure_file.follows_from_a_peer(caught.value))
    return own


def test_the_end_of_a_rank_is_no_failure_of_the_others():
    assert run_ranks(3, one_rank_ends) == [[False] * 5, [], [False] * 5]


def the_store_is_lost():
    mesh = initialize(ParallelConfig(tp=2))
    store = dist.distributed_c10d._get_default_store()
    lost = mock.Mock()
    lost.set.side_effect = dist.DistNetworkError("connection closed")
    mesh.progress._board = lost
    with pytest.raises(PeerError) as caught, mesh.progress.told():
        store.wait(["what nobody sets"], TIMEOUT)
    return str(caught.value)


def test_a_lost_store_is_another_ranks_end():
    for told in run_ranks(2, the_store_is_lost):
        assert told.startswith("in start another rank was lost: ")


def another_error():
    mesh = initialize(ParallelConfig(tp=2))
    with pytest.raises(RuntimeError, match="shape"), mesh.progress.told():
        torch.zeros(2) + torch.zeros(3).view(2)
    with pytest.raises(RuntimeError, match="mine"), mesh.progress.told():
        raise RuntimeError("mine")
    with pytest.raises(UserError, match="mine"), mesh.progress.told():
        raise UserError("mine")


def test_other_errors_pass_through():
    run_ranks(2, another_error)

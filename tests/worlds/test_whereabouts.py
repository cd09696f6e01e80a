"""Ranks that do not come to a collective are named by the one that waited."""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.distributed as dist

from megafork.config import ParallelConfig
from megafork.errors import PeerError, UserError
from megafork.parallel.topology import initialize
from tests.helpers.ranks import run_ranks

TIMEOUT_MINUTES = 0.1


def one_rank_stays_away(who, layout):
    topology = initialize(ParallelConfig(**layout, timeout_minutes=TIMEOUT_MINUTES))
    topology.any_rank(False)
    topology.whereabouts.enter("update of step 3")
    if topology.rank == who:
        topology.whereabouts.enter("eval of step 3")
        time.sleep(20)  # longer than the others wait, and than they tell
        return "slept"
    topology.whereabouts.enter("sync of step 3")
    with pytest.raises(PeerError), topology.whereabouts.told():
        dist.all_reduce(torch.zeros(1))
    return "waited"


@pytest.mark.parametrize(
    ("who", "layout"), [(1, {"tp": 3}), (0, {"pp": 3})], ids=["rank 1 of 3", "rank 0 of 3"]
)
def test_the_absent_rank_is_named_once(capfd, who, layout):
    outcomes = run_ranks(3, one_rank_stays_away, who, layout)
    assert outcomes.pop(who) == "slept"
    assert outcomes == ["waited"] * 2
    told = capfd.readouterr().err
    [found] = re.findall(
        r"error \(rank \d\): in sync of step 3 a collective was not done within "
        r"parallel\.timeout_minutes=0\.1\. Rank (\d) did not come; it has been in eval of step 3 "
        r"for (\d+) s\n",
        told,
    )
    assert int(found[0]) == who
    assert 5 <= int(found[1]) <= 10
    assert told.count("error (rank") == 1


def one_rank_ends():
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

"""Servers that sleep while the trainer has the devices: small HTTP servers, which come and go."""

from __future__ import annotations

import contextlib

import pytest

from megafork.errors import UserError
from megafork.rollout import client as client_module
from megafork.rollout import fleet as fleet_module
from megafork.rollout.client import ServerError, ServerLost
from tests.helpers.fleets import ask, fleet_of, up
from tests.helpers.rollout_servers import SmallServer, running, wait_for

WHOLE = {"weights", "kv_cache"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client_module, "_ATTEMPTS", 2)
    monkeypatch.setattr(fleet_module, "_WATCH_S", 0.05)
    monkeypatch.setattr(fleet_module, "_CHECKS", 2)
    monkeypatch.setattr(fleet_module, "_AGAIN_S", 0.1)
    monkeypatch.setattr(client_module, "_CONNECT_S", 1.0)
    monkeypatch.setattr(client_module, "_HEALTH_S", 1.0)


@contextlib.contextmanager
def colocated(servers):
    with fleet_of(servers, colocated=True) as fleet:
        up(fleet)
        assert fleet.sleep() == []
        yield fleet


def hand_over(fleet, version):
    """What Turns and WeightSync do with a client."""
    fleet.wake_up("weights")
    members = fleet.members()
    fleet.init_transfer([{"socket": "s", "token": "t"}], len(members), 5.0)
    fleet.start_weight_update()
    fleet.update_weights([])
    fleet.finish_weight_update(version)
    fleet.wake_up("kv_cache")


def asked(fleet, servers):
    """How many of eight requests each server got."""
    before = [len(server.asked) for server in servers]
    ask(fleet, range(8))
    return [len(server.asked) - b for server, b in zip(servers, before, strict=True)]


def test_all_sleep_and_wake():
    with running(2) as servers, colocated(servers) as fleet:
        for version in (1, 2):
            assert [server.asleep for server in servers] == [WHOLE] * 2
            hand_over(fleet, version)
            assert [(s.asleep, s.paused, s.version) for s in servers] == [
                (set(), False, version)
            ] * 2
            assert asked(fleet, servers) == [4, 4]
            assert fleet.sleep() == []
        assert all("/pause" not in server.calls for server in servers)
        assert all("/resume" not in server.calls for server in servers)


def test_one_that_does_not_sleep_is_told_and_joins_again():
    with running(2) as servers, colocated(servers) as fleet:
        hand_over(fleet, 1)
        servers[1].kill()
        assert fleet.sleep() == [servers[1].url]
        again = SmallServer(servers[1].port)
        again.start()
        looks = servers[0].num_looks
        wait_for(lambda: servers[0].num_looks >= looks + 3)  # and none of them is for the lost one
        assert fleet.silent() == [again.url] and again.calls == []
        hand_over(fleet, 2)
        assert asked(fleet, [servers[0], again]) == [8, 0]
        fleet.sleep()
        fleet.look_again()
        assert fleet.silent() == [] and again.asleep == set()
        assert fleet.sleep() == [] and again.asleep == WHOLE
        hand_over(fleet, 3)
        assert asked(fleet, [servers[0], again]) == [4, 4]
        assert fleet.counts()["rollout/servers_replaced"] == 1
        again.kill()


def test_one_that_dies_asleep_is_found_at_the_next_waking(monkeypatch):
    monkeypatch.setattr(fleet_module, "_WATCH_S", 600.0)  # nobody looks
    with running(2) as servers, colocated(servers) as fleet:
        servers[0].kill()
        hand_over(fleet, 1)
        assert servers[1].version == 1 and fleet.num_live == 1
        servers[1].kill()
        fleet.sleep()
        with pytest.raises(ServerLost, match="no rollout server is left"):
            fleet.wake_up("weights")


def test_one_that_is_lost_in_the_handover_keeps_nobody_awake():
    with running(3) as servers, colocated(servers) as fleet:
        servers[1].fail_next = "/wake_up"
        with pytest.raises(ServerError, match="told to fail"):
            fleet.wake_up("weights")
        assert fleet.mark_lost() == 0  # it is well
        servers[1].kill()
        with pytest.raises(UserError):
            fleet.update_weights([])
        assert fleet.mark_lost() == 1
        assert fleet.sleep() == [servers[1].url]
        hand_over(fleet, 1)
        assert [s.version for s in (servers[0], servers[2])] == [1, 1]


def test_a_server_that_is_well_and_does_not_sleep_is_an_error():
    with running(2) as servers, colocated(servers) as fleet:
        hand_over(fleet, 1)
        servers[0].fail_next = "/sleep"
        with pytest.raises(ServerError, match=r"/sleep.* failed with HTTP 500: told to fail"):
            fleet.sleep()
        assert fleet.num_live == 2 and servers[1].asleep == WHOLE


def test_a_server_that_hangs_does_not_sleep():
    with running(2) as servers, colocated(servers) as fleet:
        hand_over(fleet, 1)
        servers[0].silent = True
        wait_for(lambda: fleet.silent() == [servers[0].url])
        assert fleet.sleep() == [servers[0].url]

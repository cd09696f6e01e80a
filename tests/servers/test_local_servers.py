"""The servers of a node: real processes under the real supervisor, which serve no model."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from megafork.config import ServerConfig
from megafork.errors import UserError
from megafork.rollout import engine as engine_module
from megafork.rollout.client import RolloutClient
from megafork.rollout.engine import Served, start_here
from megafork.rollout.placement import NodeDevices
from megafork.rollout.vllm_server import log_paths
from tests.helpers.blocking import Blocking
from tests.helpers.commands import QUICKSTART, gone_within, members
from tests.helpers.rollout_servers import stand_in_for_python, wait_for

SERVED = Served(str(QUICKSTART / "model"), "float32", 64)


@pytest.fixture
def start(tmp_path):
    python = stand_in_for_python(tmp_path)

    def of(count, shared=False, **options):
        rollout = ServerConfig(servers=count, python=str(python), startup_timeout_s=60)
        logs = log_paths(tmp_path / "vllm.log", count)
        return start_here(SERVED, rollout, NodeDevices("cpu", shared=shared), logs, **options)

    return of


def groups(local):
    return [kept.server.process_group for kept in local._kept]


def blocking(local):
    return [Blocking(client) for client in local.clients(10.0)]


def kill(local, number):
    os.killpg(groups(local)[number], signal.SIGKILL)


def test_a_server_that_ends_is_started_again_where_it_was(start, tmp_path):
    with start(2, max_restarts=1) as local:
        local.wait()
        clients = blocking(local)
        assert [client.weight_version() for client in clients] == [0, 0]
        before = groups(local)
        for process_group in before:  # the key goes by the environment
            lines = [process.cmdline() for process in members(process_group)]
            assert local._kept[0].server.api_key not in str(lines)
        kill(local, 1)
        wait_for(lambda: groups(local)[1] != before[1] and clients[1].is_alive(), 60)
        assert clients[1].weight_version() == 0  # the same address and key
        assert groups(local)[0] == before[0]
        assert sorted(p.name for p in tmp_path.glob("*.log")) == [
            "vllm-0.log", "vllm-1.1.log", "vllm-1.log"
        ]  # fmt: skip
        wait_for(lambda: local._kept[1]._up_since is not None)
        kill(local, 1)
        wait_for(lambda: local.given_up(), 60)
        assert list(local.given_up()) == [clients[1].url]
        assert clients[0].is_alive()
        after = groups(local)
    assert all(gone_within(process_group, 1) for process_group in before + after)


def test_restarts_are_forgiven_when_the_run_goes_on(start):
    with start(1, max_restarts=1) as local:
        local.wait()
        [client] = blocking(local)
        for _ in range(2):
            before = groups(local)
            kill(local, 0)
            wait_for(lambda before=before: groups(local) != before and client.is_alive(), 60)
            wait_for(lambda: local._kept[0]._up_since is not None)
            local.forgive()
        assert local.given_up() == {}


def test_a_server_that_hangs_is_started_again_when_asked(start, monkeypatch):
    with start(1, max_restarts=1) as local:
        local.wait()
        [before] = groups(local)
        [client] = blocking(local)
        local.restart([client.url])  # it has just come up
        assert groups(local) == [before]
        monkeypatch.setattr(engine_module, "_SETTLED_S", 0.0)
        server = max(members(before), key=psutil.Process.create_time)
        server.suspend()
        local.restart(["http://127.0.0.1:1"])
        assert groups(local) == [before]
        local.restart([client.url])
        wait_for(lambda: groups(local) != [before] and client.is_alive(), 60)
        assert gone_within(before, 1)


def test_a_server_that_never_comes_up_is_not_tried_again(start, tmp_path):
    local = start(1, max_restarts=3)
    (tmp_path / "python").write_text("#!/bin/sh\necho 'OSError: no weights' >&2\nexit 1\n")
    with local, pytest.raises(UserError, match="OSError: no weights"):
        local.wait()
    assert list(tmp_path.glob("*.log")) == [tmp_path / "vllm.log"]


def test_ports_differ_and_keys_are_shared(start):
    local = start(8)
    assert len(set(local.urls)) == 8
    assert len({kept.server.api_key for kept in local._kept}) == 1
    assert all(isinstance(client, RolloutClient) for client in local.clients(1.0))


def test_servers_in_turns_are_started_again_when_asked(start):
    with start(2, max_restarts=1, shared=True) as local:
        local.wait()
        clients, before = blocking(local), groups(local)
        kill(local, 0)
        wait_for(lambda: local._kept[0]._up_since is None)
        local.end([clients[1].url])
        assert all(gone_within(process_group, 1) for process_group in before)
        wait_for(lambda: local._kept[1]._up_since is None)
        assert not any(client.is_alive() for client in clients)
        local.start_again([clients[1].url])
        assert [client.is_alive() for client in clients] == [False, True]
        assert groups(local)[0] == before[0]  # it had no successor
        local.start_again([clients[0].url])
        assert clients[0].is_alive()
        hung = groups(local)[1]
        max(members(hung), key=psutil.Process.create_time).suspend()
        local.start_again([clients[1].url])  # once too often, without forgive
        assert gone_within(hung, 1)
        assert list(local.given_up()) == [clients[1].url]
        assert clients[0].is_alive()
        with pytest.raises(ZeroDivisionError):
            local.start_again([clients[0].url], lambda: 1 / 0)


def test_a_server_that_is_ended_while_it_starts_leaves_nothing(start):
    with start(1, max_restarts=5, shared=True) as local:
        local.wait()
        url = local.urls[0]

        class Stopped(Exception):
            pass

        def stop():
            raise Stopped

        with pytest.raises(Stopped):
            local.start_again([url], stop)
        local.stop()
        last = groups(local)[0]
        assert local.given_up() == {}
    assert last is None or gone_within(last, 1)

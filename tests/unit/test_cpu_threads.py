"""How many threads a server on a CPU has."""

from __future__ import annotations

import os

import pytest

from megafork.config.rollouts import ServerConfig
from megafork.rollout.engine import Served, build_server
from tests.helpers.commands import QUICKSTART

CORES = {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("settings", "variable", "threads"),
    [
        ({}, None, 6),
        ({"servers": 2}, None, 3),
        ({"servers": 9}, None, 1),
        ({}, "", 6),
        ({}, "many", 6),
        ({}, "0", 6),
        ({"servers": 2}, "4", 4),
        ({}, "4,2", 4),
        ({"cpu_threads": 5}, "4", 5),
    ],
)
def test_asked_for_or_the_users_or_its_share_of_the_cores(
    settings, variable, threads, monkeypatch, tmp_path
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: CORES)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    rollout = ServerConfig(**settings)
    served = Served(QUICKSTART / "model", "float32", 64)
    server = build_server(served, rollout, "cpu", tmp_path / "vllm.log")
    assert server._environment(tmp_path)["OMP_NUM_THREADS"] == str(threads)

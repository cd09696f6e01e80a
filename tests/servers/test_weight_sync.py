"""Megatron's weights in a real vLLM: after a push, both give the same log-probabilities."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from megafork.config import ModelConfig, ParallelConfig, SyncConfig
from megafork.errors import PeerError, UserError
from megafork.model.scorer import Scorer
from megafork.parallel.mesh import initialize
from megafork.rollout.client import RolloutClient
from megafork.rollout.sampling import Sampling
from megafork.rollout.vllm_server import VllmServer
from megafork.weights import mismatch_check
from tests.helpers import reference
from tests.helpers.blocking import Blocking
from tests.helpers.commands import tiny_engine
from tests.helpers.controllers import OneServer, probe
from tests.helpers.pushes import OPTIONS, PROMPTS, SAMPLING, kill_in_the_middle, make_sync
from tests.helpers.shared_servers import ON_VLLM, random_server
from tools.benchmarks.ranks import run_ranks


@pytest.fixture(params=ON_VLLM)
def server(request, tmp_path_factory, tmp_path):
    """(a server of random models, the folder of another model of the same shape)."""
    trained = reference.save_model(tmp_path / "trained", tied=request.param == "vllm-tied", seed=2)
    with random_server(tmp_path_factory, request.param) as (running, _):
        yield running, trained


def push_twice(url, api_key, folder, layout, version):
    client = OneServer(url, api_key)
    with make_sync(client, folder, layout, sync={"bucket_mib": 1}) as (sync, _):
        scorer, mesh = sync.policy, sync.mesh

        def measure():
            groups = mesh.on_rank_zero(lambda: asyncio.run(probe(client, PROMPTS, SAMPLING)))
            return mismatch_check.measure(groups, scorer, mesh)

        before = measure()
        sync.push(version)
        first = measure()
        with torch.no_grad():
            for rule, parameter in (p for stage in scorer.stages for p in stage.parameters()):
                parameter.mul_(0.8 if "norm" in rule.megatron else 1.1)
        stale = measure()
        sync.push(version + 1)
        return before, first, stale, measure()


LAYOUTS = [
    {},
    {"tp": 2},
    {"pp": 2},
    {"tp": 2, "pp": 2},
    {"dp": 2},
    {"cp": 2},
    {"pp": 2, "vpp": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_log_probabilities_agree_after_every_push(server, layout):
    running, trained = server
    version = Blocking(running.client()).weight_version() + 10
    arguments = (running.url, running.api_key, trained, layout, version)
    for ranks in run_ranks(ParallelConfig(**layout).world_size, push_twice, *arguments):
        before, first, stale, second = ranks
        assert first.difference.num_tokens == len(PROMPTS) * SAMPLING.max_tokens
        assert first.max_difference <= 1e-4
        assert second.max_difference <= 1e-4
        assert (
            min(before.difference.absolute, stale.difference.absolute) > 1e-2
        )  # the check can fail
        mismatch_check.require(first, SyncConfig(), "float32")
        with pytest.raises(UserError, match="trainer and rollout server disagree"):
            mismatch_check.require(stale, SyncConfig(), "float32")
    assert Blocking(running.client()).weight_version() == version + 1


def push_of_another_shape(url, api_key, folder):
    """The error of a push on this rank: (its type, its text)."""
    with (
        make_sync(OneServer(url, api_key), folder, {"tp": 2}) as (sync, _),
        pytest.raises(UserError) as caught,
    ):
        sync.push(99)
    return caught.type, str(caught.value)


@pytest.mark.slow
def test_a_push_that_fails_is_told_by_rank_zero_and_hangs_nobody(tmp_path):
    served = reference.save_model(tmp_path / "served", tied=True, layers=2)
    other = reference.save_model(tmp_path / "other", tied=True, layers=4)
    with VllmServer(served, log_path=tmp_path / "vllm.log", **OPTIONS) as running:
        arguments = (running.url, running.api_key, other)
        first, second = run_ranks(2, push_of_another_shape, *arguments, timeout=100)
    assert first[0] is UserError
    assert "the weight transfer to the rollout server failed" in first[1]
    assert "does not answer" not in first[1]
    assert second[0] is PeerError


def push_to_a_server_that_dies(dying, process_group, other, folder, layout):
    """Its errors, and the agreement with another server after a push to that one."""
    with make_sync(OneServer(*dying), folder, layout) as (sync, pushing):
        mesh = sync.mesh
        kill_in_the_middle(sync, process_group)
        with pytest.raises(UserError) as caught:
            sync.push(5)
        client = pushing.pushes.fleet = OneServer(*other)
        sync.push(6)
        groups = mesh.on_rank_zero(lambda: asyncio.run(probe(client, PROMPTS, SAMPLING)))
        found = mismatch_check.measure(groups, sync.policy, mesh)
    return caught.type, str(caught.value), found.max_difference


@pytest.mark.slow
def test_a_server_that_dies_of_a_push_and_another_that_takes_it(tmp_path):
    served = reference.save_model(tmp_path / "served", tied=True, seed=1)
    trained = reference.save_model(tmp_path / "trained", tied=True, seed=2)
    options = OPTIONS | {"python": str(tiny_engine(tmp_path))}
    with (
        VllmServer(served, log_path=tmp_path / "dying.log", **options) as dying,
        VllmServer(served, log_path=tmp_path / "other.log", **options) as other,
    ):
        first, second = run_ranks(
            2,
            push_to_a_server_that_dies,
            (dying.url, dying.api_key),
            dying.process_group,
            (other.url, other.api_key),
            trained,
            {"pp": 2},  # two senders
            timeout=150,
        )
        assert Blocking(other.client()).weight_version() == 6
    assert first[0] is UserError
    assert "the weight transfer to the rollout server failed" in first[1]
    assert second[0] is PeerError
    assert max(first[2], second[2]) <= 1e-4


def probe_at(url, api_key, folder, samplings):
    """The agreement of a bfloat16 trainer at a temperature of 1 with each way to sample."""
    parallel = ParallelConfig(tp=2)
    mesh = initialize(parallel)
    model = ModelConfig(path=str(folder), dtype="bfloat16")
    scorer = Scorer(model, parallel, mesh, micro_batch_tokens=512)
    found = []
    for sampling in samplings:
        groups = mesh.on_rank_zero(
            lambda s=sampling: asyncio.run(probe(RolloutClient(url, api_key), LONG, s))
        )
        found.append(mismatch_check.measure(groups, scorer, mesh))
    return found


LONG = [replace(prompt, index=i) for i, prompt in enumerate(PROMPTS * 2)]
WAYS = {
    "as the trainer": Sampling(max_tokens=100),
    "temperature of 0.95": Sampling(max_tokens=100, temperature=0.95),
    "top_p of 0.95": Sampling(max_tokens=100, top_p=0.95),
}


@pytest.mark.slow
def test_in_bfloat16_a_server_that_samples_otherwise_is_found(tmp_path):
    folder = reference.save_model(tmp_path / "model", tied=True, dtype=torch.bfloat16)
    options = OPTIONS | {"dtype": "bfloat16"}
    with VllmServer(folder, log_path=tmp_path / "vllm.log", **options) as running:
        arguments = running.url, running.api_key, folder, list(WAYS.values())
        found, _ = run_ranks(2, probe_at, *arguments)
    found = dict(zip(WAYS, found, strict=True))
    print(found)
    mismatch_check.require(found.pop("as the trainer"), SyncConfig(), "bfloat16")
    complaints = {"temperature of 0.95": "sync.max_slope", "top_p of 0.95": "sync.max_bias"}
    for way, other in found.items():
        with pytest.raises(UserError, match=complaints[way]):
            mismatch_check.require(other, SyncConfig(), "bfloat16")

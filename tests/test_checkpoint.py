"""A run's folder of checkpoints: which stay, which are damaged, what a failed save leaves."""

from __future__ import annotations

import random
import resource
import shutil

import numpy
import pytest
import torch

from megafork.checkpoint.store import MANIFEST, STATE
from megafork.errors import UserError
from tests import reference
from tests.ranks import run_ranks
from tests.trained import load, make_trained, save, store_of

pytestmark = pytest.mark.slow


def save_several(folder, target, steps, config):
    policy = make_trained(folder, {"dp": 2})
    store = store_of(policy, target, **config)
    for step in steps:
        with torch.no_grad():
            policy.stages[0].gpt.decoder.final_layernorm.weight.fill_(step)
        save(policy, store, step)
        store.poll()
    store.finish()
    return sorted(path.name for path in target.iterdir())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_old_checkpoints_go_and_multiples_stay(tmp_path, asynchronous):
    folder = reference.save_model(tmp_path / "model", tied=False)
    config = {"keep_last": 2, "keep_every": 4, "asynchronous": asynchronous}
    for names in run_ranks(2, save_several, folder, tmp_path / "out", range(1, 8), config):
        assert names == ["step_000004", "step_000006", "step_000007"]


def find_newest(folder, target):
    policy = make_trained(folder, {"dp": 2})
    store = store_of(policy, target)
    path = store.newest()
    if path is None:
        return None
    state = store.load(path, policy.stages, policy.optimizer)
    weight = policy.stages[0].gpt.decoder.final_layernorm.weight
    assert (weight == state["step"]).all()
    return path.name


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a tensor file is cut": lambda folder: cut(next(folder.glob("__0_*.distcp"))),
    "one bit of it is flipped": lambda folder: flip(next(folder.glob("__1_*.distcp"))),
    "the state is gone": lambda folder: (folder / STATE).unlink(),
    "there is no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "the manifest is cut": lambda folder: cut(folder / MANIFEST),
    "it was not written to its end": lambda folder: folder.rename(f"{folder}.partial"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    model = reference.save_model(folder / "model", tied=False)
    run_ranks(2, save_several, model, folder / "out", [1, 2], {})
    assert run_ranks(2, find_newest, model, folder / "out") == ["step_000002"] * 2
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capfd, two_checkpoints, damage):
    folder = two_checkpoints / "model"
    shutil.copytree(two_checkpoints / "out", tmp_path / "out")
    DAMAGE[damage](tmp_path / "out" / "step_000002")
    assert run_ranks(2, find_newest, folder, tmp_path / "out") == ["step_000001"] * 2
    if "not written" not in damage:
        told = capfd.readouterr().err
        assert f"{tmp_path}/out/step_000002 is damaged (" in told
        assert told.count("passed over") == 1


def test_no_checkpoint_is_none(tmp_path):
    folder = reference.save_model(tmp_path / "model", tied=False)
    assert run_ranks(2, find_newest, folder, tmp_path / "out") == [None, None]


def save_without_room(folder, target, asynchronous):
    """The second save may write files of 100 kB at most, as on a disk that is full."""
    policy = make_trained(folder, {"tp": 2})
    store = store_of(policy, target, asynchronous=asynchronous)
    with torch.no_grad():
        policy.stages[0].gpt.decoder.final_layernorm.weight.fill_(1)
    save(policy, store, 1)
    store.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        save(policy, store, 2)
        store.finish()
    except UserError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, asynchronous):
    folder = reference.save_model(tmp_path / "model", tied=False)
    target = tmp_path / "out"
    outcomes = run_ranks(2, save_without_room, folder, target, asynchronous)
    assert [name for name, _ in outcomes] == ["UserError", "PeerError"]
    message = outcomes[0][1]
    assert "the checkpoint of step 2 could not be written" in message
    assert f"{target / 'step_000001'} is untouched" in message
    assert "File too large" in message or "OSError" in message  # as megatron tells it
    assert [path.name for path in target.iterdir()] == ["step_000001"]
    assert run_ranks(2, find_newest, folder, target) == ["step_000001"] * 2


def draw():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def save_generators(folder, target):
    policy = make_trained(folder, {"dp": 2})
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(7 + policy.topology.rank)
    draw()
    store = store_of(policy, target)
    save(policy, store, 1)
    store.finish()
    return draw()


def draw_after_load(folder, target):
    policy = make_trained(folder, {"dp": 2})
    load(policy, store_of(policy, target))
    return draw()


def test_random_generators_go_on(tmp_path):
    folder = reference.save_model(tmp_path / "model", tied=False)
    before = run_ranks(2, save_generators, folder, tmp_path / "out")
    assert before[0] != before[1]
    assert run_ranks(2, draw_after_load, folder, tmp_path / "out") == before
